"""Draws .github/curves.png and .github/digits.png with matplotlib.

From the runs of the README's first table, seeds N = 0 to 4, made with --output-dir as
runs/co-N, runs/balance-N (--balance) and runs/set-N (--warm-up 20)."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import coreg  # noqa: E402

plt.rcParams.update({"font.size": 12, "figure.dpi": 110, "savefig.bbox": "tight"})
VARIANTS = {"set": ("set loss alone", "tab:gray"), "co": ("Co-Reg", "tab:blue"),
            "balance": ("Co-Reg with --balance", "tab:green")}
train, names, _, class_names = coreg.read_dataset(coreg.parse([]))
labels = torch.tensor([label for _, label in train])
sets = coreg.read_annotations("runs/co-0/annotations.csv", names, class_names) > 0  # [N,K]
holds_label = sets[torch.arange(len(labels)), labels]

# Accuracy by epoch: five seeds are thin lines, their mean is a thick one.
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6))
for name, (title, color) in VARIANTS.items():
    curves = []
    for seed in range(5):
        lines = Path(f"runs/{name}-{seed}/metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["test_acc"] for line in lines])
        left.plot(range(1, 21), curves[-1], color=color, linewidth=0.6, alpha=0.6)
    left.plot(range(1, 21), np.mean(curves, 0), color=color, linewidth=3, label=title)
left.axhline(72.4, color="black", linestyle=":", label="the annotator")
left.axvline(8.5, color="tab:red", linestyle="--", linewidth=1)
left.text(8.3, 57, "co-training starts", color="tab:red", ha="right")
left.set(xlabel="epoch", ylabel="right test images in %", ylim=(55, 100), xlim=(1, 20))
left.set_xticks([1, 5, 10, 15, 20])
left.set_title("Five seeds (thin) and their mean (thick)")
left.legend(loc="lower right")

# The last split of network 1: what the mixture sees, the losses of five epochs on one scale.
state = torch.load("runs/co-0/checkpoint.pt", weights_only=True)
losses = torch.stack(state["learners"][0]["losses"])  # [E,N]
low = losses.amin(1, keepdim=True)
high = losses.amax(1, keepdim=True)
scaled = ((losses - low) / (high - low)).mean(0)  # [N]
is_clean = coreg.clean_probability(losses) > coreg.CLEAN_THRESHOLD
threshold = scaled[is_clean].max().item()
bins = np.linspace(0, 1, 40)
for mask, title in ((holds_label, "hold the true label"), (~holds_label, "do not hold it")):
    weights = np.full(mask.sum(), 100 / mask.sum())  # each kind adds up to 100 %
    title = f"{mask.sum()} sets that {title}"
    right.hist(scaled[mask], bins, weights=weights, alpha=0.6, label=title)
right.axvline(threshold, color="tab:red", linestyle="--", linewidth=1)
right.text(threshold + 0.02, 25, "not clean", color="tab:red")
right.text(threshold - 0.02, 25, "clean", color="tab:red", ha="right")
right.set(xlabel="loss of a set (Eq. 4), scaled to 0..1", ylabel="share of its kind in %")
right.set_title("The last split of network 1, seed 0")
right.legend(loc="upper right")
figure.savefig(HERE / "curves.png")

# One digit with the answers of the five drawn styles, then repaired and wrong digits.
_, classify = coreg.load_classifier("runs/co-0")
found = classify([image for image, _ in train]).argmax(1)
repaired = ((found == labels) & ~holds_label).nonzero().flatten().tolist()
wrong = ((found != labels) & ~holds_label).nonzero().flatten().tolist()
wrong += ((found != labels) & holds_label).nonzero().flatten().tolist()

def different(rows):
    """The first rows of six different digits, as far as there are so many."""
    chosen = {}
    for row in rows:
        chosen.setdefault(labels[row].item(), row)
    return [*chosen.values(), *(row for row in rows if row not in chosen.values())][:6]

def show(place, image, title, color="white"):
    place.imshow(image, "gray")
    place.set_xticks([])
    place.set_yticks([])
    place.set_title(title, fontsize=12)
    for spine in place.spines.values():
        spine.set(color=color, linewidth=5)

figure, places = plt.subplots(3, 6, figsize=(12, 7.6), layout="tight")
clip = coreg.load_clip("tiny", "", "cpu")
templates = coreg.TEMPLATES["digits"]
answers = [coreg.annotate(clip, train, class_names, [template], "cpu")[1].int().argmax(1)
           for template in templates]  # of each style, [N]
unsure = (holds_label & (sets.sum(1) == 3)).nonzero().flatten()[0].item()
show(places[0, 0], train[unsure][0], f"an image of a {labels[unsure]}")
places[0, 0].set_ylabel("answers", fontsize=18)
for t, template in enumerate(templates):
    answer = answers[t][unsure].item()
    [drawing] = coreg.draw([template.replace("{}", class_names[answer])])
    style = template.split()[1]
    show(places[0, t + 1], drawing[0], f"{style}: {answer}")
kinds = [(1, repaired, "tab:green", "repaired"), (2, wrong, "tab:red", "wrong")]
for line, rows, color, word in kinds:
    places[line, 0].set_ylabel(word, fontsize=18, color=color)
    for place, row in zip(places[line], different(rows)):
        members = ", ".join(str(k) for k in sets[row].nonzero().flatten().tolist())
        title = f"a {labels[row]}: set {{{members}}}\nfound {found[row]}"
        show(place, train[row][0], title, color)
figure.savefig(HERE / "digits.png")
