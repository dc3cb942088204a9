"""Tests of coreg.py: python -m pytest -q test_coreg.py. Benchmark: test_coreg.py --help"""

import argparse
import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import nn
from torch._subclasses import FakeTensorMode, fake_impls

import coreg as C

torch.set_num_threads(1)  # The tensors are tiny: threads would only wait for each other.

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A test is seeded, runs in an empty folder and has no network."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: open("none"))  # OSError
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def close(actual, expected, tol=1e-5):
    """Both are tensors, numbers or lists, with equal shapes and values."""
    actual, expected = [torch.as_tensor(value).detach() for value in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, check_dtype=False)

def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

def one_line(capsys, *texts):
    """The errors must be one line with the texts, beside those of images that are left out."""
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if not line.startswith("left out: ")]
    assert line.startswith("coreg.py: ")
    assert all(text in line for text in texts), line

def refused(capsys, argv, *texts):
    """main(argv) must end with code 2 and one line that has the texts, and change no file."""
    before = contents()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "train_epoch", lambda *args: pytest.fail("it trains"))
        assert C.main([str(word) for word in argv]) == 2
    one_line(capsys, *texts)
    assert contents() == before

def write(path, content):
    """An image, as PNG whatever the suffix, or bytes -> file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, "PNG")
    else:
        path.write_bytes(content)

def grey(*paths):
    """Images whose grey value is the last number in the path."""
    for path in paths:
        write(Path(path), np.full((8, 8), int(re.findall(r"\d+", path)[-1]), np.uint8))

# (1) Prompt templates ----------------------------------------------------------------------
# (2) CLIP annotation -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_candidate_sets_by_hand(dtype):
    probs = torch.tensor([  # [T=3,N=3,K=4]
        [[4, 3, 1, 0], [0, 2, 2.5, 4], [4, 3, 1, 0]],
        [[3, 4, 1, 0], [0, 1, 3, 4], [1, 3, 4, 0]],
        [[4, 2, 2, 0], [1, 4, 1, 2], [0, 3, 1, 4]]], dtype=dtype) / 8
    sets = C.candidate_sets(probs)
    assert sets.dtype == torch.bool
    assert sets.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 1]]

@pytest.mark.parametrize("partial_rate, noise_rate", [(0, 0), (0.3, 0), (0.3, 0.2), (0.1, 1)])
def test_flip_candidates_rates(partial_rate, noise_rate):
    labels = torch.arange(6000) % 10
    sets = C.flip_candidates(labels, 10, partial_rate, noise_rate, torch.Generator())
    assert abs(sets[range(6000), labels].float().mean() - (1 - noise_rate)) < 0.025
    wrong = sets.sum() - 6000  # Where the true label went, a wrong one took its place.
    assert abs(wrong / 6000 / 9 - partial_rate) < 0.01
    assert C.flip_candidates(labels, 10, 1.0, noise_rate, torch.Generator()).all()

@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """The flags of a CLIP of one thin layer with random weights, which open_clip builds."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(5)
    torch.save(open_clip.create_model("small-clip").state_dict(), folder / "weights.pt")
    return ["--clip-model", "small-clip", "--clip-pretrained", str(folder / "weights.pt")]

def test_annotate_matches_a_plain_loop(small_clip):
    model, preprocess, tokenizer = clip = C.load_clip(small_clip[1], small_clip[3], "cpu")
    assert not model.training
    names = ["cat", "fire engine", "seven"]
    templates = ["a photo of a {}", "{}", "many {}s", "no {}!"]
    arrays = [torch.randint(256, (30, 40, 3)).byte().numpy() for _ in range(5)]
    pairs = [(Image.fromarray(array), -1) for array in arrays]
    scores = torch.empty(4, 5, 3)
    for t, template in enumerate(templates):
        for k, name in enumerate(names):
            u = model.encode_text(tokenizer([template.format(name)]))[0]
            for i, (image, _) in enumerate(pairs):
                v = model.encode_image(preprocess(image)[None])[0]
                scores[t, i, k] = model.logit_scale.exp() * (v @ u) / (v.norm() * u.norm())
    probs = scores.detach().softmax(2)
    assert min(probs.std(axis).mean() for axis in range(3)) > 0.005  # Each axis matters.
    means, sets = C.annotate(clip, pairs, names, templates, "cpu")
    torch.testing.assert_close(means, probs.mean(0), rtol=1e-4, atol=1e-4)  # float32, too
    answers = [{probs[t, i].argmax().item() for t in range(4)} for i in range(5)]
    assert sets.tolist() == [[k in answer for k in range(3)] for answer in answers]
    with pytest.raises(C.UserError, match="cannot be read now"):
        C.annotate(clip, [(Path("none.png"), -1), *pairs], names, templates, "cpu")

@pytest.mark.parametrize("name, weights, text", [
    ("no-such-clip", "openai", "no-such-clip"), ("small-clip", "no-such-tag", "no-such-tag"),
    ("small-clip", "other.pt", "Missing key"), ("small-clip", "", "small-clip")])
def test_main_names_a_model_that_does_not_load(name, weights, text, small_clip, capsys):
    torch.save(torch.nn.Linear(2, 3).state_dict(), "other.pt")
    argv = ["--clip-model", name, "--clip-pretrained", weights, "--num-samples", 9]
    refused(capsys, argv, f"--clip-model {name} --clip-pretrained {weights}", text)

@pytest.mark.parametrize("classes, template, model, text", [
    ("Cat,cat", "a {}", "small-clip", "alike"), ("a,b", "a {}", "tiny", "number six"),
    ("a,b", "word " * 80 + "{}", "small-clip", "alike"),
    ("one,cat", "a wide number {}", "tiny", "number six")])
def test_main_refuses_unfit_names(classes, template, model, text, small_clip, capsys):
    grey("p/train/1.png", "p/train/2.png")
    argv = ["--dataset", "folder", "--data-dir", "p", "--classes", classes, *small_clip]
    refused(capsys, [*argv, "--templates", template, "--clip-model", model], text)

@pytest.mark.parametrize("flags, text", [
    ("--templates a", "--templates"), ("--templates a_{};the", "'the'"),
    ("--annotations none.csv", "none.csv"), ("--classes a,b,a", "'b', 'a']"),
    ("--classes a,,b", "'', 'b']"), ("--classes a", "'a']"),
    ("--data-dir q", r"'utf-8' codec can't encode character '\udcff' in position 3")])
def test_main_checks_before_it_loads_CLIP(flags, text, monkeypatch, capsys):
    forbid_clip(monkeypatch)
    grey("p/train/1.png", "p/train/2.png", "q/train/1.png")
    shutil.copy("p/train/1.png", b"q/train/odd\xff.png")
    refused(capsys, f"--dataset folder --data-dir p --classes a,b {flags}".split(), text)

# (3) The weak/strong data set --------------------------------------------------------------
def make_pictures(count, channels, side):
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8)

def make_data(images, flags):
    candidates = torch.ones(len(images), 3, dtype=torch.bool)
    return C.WeakStrongImages(images, candidates, C.parse(flags.split()))

@pytest.mark.parametrize("mirror, channels", [(0, 1), (1, 3)])
def test_weak_shifts_by_up_to_an_eighth_mirrors_half_and_normalises(mirror, channels):
    image = make_pictures(1, channels, 16)
    image[:, 0] //= 3  # The channels differ in mean and deviation.
    windows = F.pad(image, (2, 2, 2, 2)).unfold(2, 16, 1).unfold(3, 16, 1)[0].flatten(1, 2)
    windows = torch.cat([windows, windows.flip(3)], 1).movedim(1, 0)  # [25 + 25,C,16,16]
    data = make_data(image.repeat(800, 1, 1, 1), "--mirror" if mirror else "--no-mirror")
    std, mean = torch.std_mean(image / 255, (0, 2, 3), correction=0, keepdim=True)
    views = ((data.weak(torch.arange(800)) * std + mean) * 255).round()
    found = (views[:, None] == windows).flatten(2).all(2)  # [800,25 + 25]
    assert found.any(1).all()
    counts = found.sum(0)
    assert counts.max() < 70
    assert (counts[:25] + counts[25:]).min() > 0
    assert abs(counts[25:].sum() / 800 - mirror / 2) < 0.05

@pytest.mark.parametrize("channels, side, least, most", [
    (3, 32, 0, 16), (1, 24, 0, 8), (1, 28, 16, 16)])
def test_cutout_blanks_one_square(channels, side, least, most):
    images = torch.full((2000, channels, side, side), 0.8)
    changed = C.cutout(images, least / side, most / side)
    hit = (changed != images).any(1)  # [N,H,H]
    assert (changed.movedim(1, 3)[hit] == 0).all()
    rows, columns = [hit.any(axis) for axis in (2, 1)]
    assert torch.equal(hit, rows[:, :, None] & columns[:, None])  # It is a rectangle.
    inner = ~(rows | columns)[:, [0, -1]].any(1) & hit.any((1, 2))
    heights = rows[inner].sum(1)
    assert (heights - columns[inner].sum(1)).abs().max() <= 1  # 3.5 pixels cover 3 or 4.
    assert set(heights.tolist()) == set(range(max(least, 1), most + 1))
    assert hit[:, side // 4, -side // 4].any() or least  # off the diagonal, too
    for line in (rows, columns):  # The centre lies anywhere.
        assert abs(line[:, side // 2].float().mean() - (least + most) / 2 / side) < 0.04

def test_mean_and_deviation_are_of_at_most_1000_images():
    images = torch.zeros(2500, 1, 2, 2, dtype=torch.uint8)
    images[::3] = 51
    data = make_data(images, "")
    close([data.mean, data.std], [0.2, 1 / 255])

def test_random_operation_changes_a_16th_of_the_batch_alike():
    images = make_pictures(1, 3, 16).repeat(64, 1, 1, 1)
    changed = C.random_operation(images)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    parts = changed.unflatten(0, (16, 4))
    assert torch.equal(parts, parts[:, :1].repeat(1, 4, 1, 1, 1))
    assert len({str(part[0].tolist()) for part in parts}) > 8
    means = {C.random_operation(images[:1]).float().mean().item() for _ in range(300)}
    assert len(means) > 60  # Their strength differs, too.

@pytest.mark.parametrize("channels, kept", [(1, True), (3, False)])
def test_strong_operations_are_for_colour_alone_and_get_uint8(channels, kept, monkeypatch):
    dtypes = []
    monkeypatch.setattr(C, "random_operation", lambda x: dtypes.append(x.dtype) or 255 - x)
    data = make_data(make_pictures(8, channels, 16), f"--channels {channels} --cutout 0 0")
    torch.manual_seed(1)
    weak = data.weak(torch.arange(8))
    torch.manual_seed(1)
    assert torch.equal(data.strong(torch.arange(8)), weak) == kept
    assert dtypes == [torch.uint8] * (not kept)

# (4) Both networks -------------------------------------------------------------------------
def settings(text=""):
    few = """--width 4 --batch-size 3 --lr 0.1 --momentum 0.9 --epochs 9 --warm-up 1
        --start-contrastive 1 --lambda-u 0.7 --temperature 0.4 --proto-weight 0.2
        --contrastive-weight 0.3 """
    return C.parse((few + text).split())

class SmallNet(nn.Module):
    """Linear in 4 pixels. It notes of its calls: number of images, train mode, gradient."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5)
        self.calls = []
    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        return self.fc(images.flatten(1)), F.normalize(self.head(images.flatten(1)))

def small_learner(cfg):
    learner = C.Learner(3, cfg, "cpu")
    learner.net = SmallNet()
    learner.key_net = SmallNet()
    learner.queue = C.MomentumQueue(7, 5)
    learner.optimizer = torch.optim.SGD(learner.net.parameters(), cfg.lr, 0.9)
    return learner

class SmallData:
    """For WeakStrongImages: a view depends on its row and on its place in the batch."""
    def __init__(self, count):
        self.images = torch.randn(count, 1, 2, 2)
        self.candidates = torch.rand(count, 3) < 0.4
        self.candidates[torch.arange(count), torch.arange(count) % 3] = True
    def weak(self, rows):
        return self.images[rows] + 0.1 * (torch.arange(len(rows)) % 60).view(-1, 1, 1, 1)
    def strong(self, rows):
        return self.images[rows] / 2 - 0.1 * torch.arange(len(rows)).view(-1, 1, 1, 1)

def random_probs(*shape):
    return torch.randn(*shape).softmax(-1)

def unit_rows(*shape):
    return F.normalize(torch.randn(*shape), dim=1)

def test_Learner_takes_the_published_optimizer_and_the_precision_asked_for():
    for word in ("bf16", "fp32"):
        learner = C.Learner(3, settings(f"--precision {word}"), "cpu")
        assert learner.net.bf16 == (word == "bf16")
    [group] = learner.optimizer.param_groups
    assert [group[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 5e-4]

@pytest.mark.parametrize("has_it", [True, False])
def test_bf16_is_fast_on_a_GPU_that_need_not_emulate_it(has_it, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert C.bf16_is_fast(torch.device("cuda:1")) is has_it

def test_CoRegNet_has_the_published_number_of_parameters():
    assert sum(weight.numel() for weight in C.CoRegNet(10).parameters()) == 11_499_594

# (5) Warm-up -------------------------------------------------------------------------------
def test_partial_cross_entropy_by_hand_and_at_the_edge():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    numbers = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]])  # A full set does not count.
    expected = -(math.log(0.8 + 1e-5) + math.log(0.1 + 1e-5)) / 2
    for sets in (numbers.bool(), numbers.byte()):
        close(C.partial_cross_entropy(probs.log() + 5, sets), expected, 1e-6)
        close(C.partial_cross_entropy(probs, sets[1:2]), 0.0)
    logits = torch.tensor([[0, 0, 1e4]], requires_grad=True)
    loss = C.partial_cross_entropy(logits, sets[:1])
    close(loss, -math.log(1e-5))
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 3))

def test_warm_up_epoch_learns_from_strong_views_in_training_mode(monkeypatch):
    monkeypatch.setattr(C, "random_batches", lambda rows, batch_size: rows.split(batch_size))
    cfg = settings()
    learner = small_learner(cfg)
    data = SmallData(8)
    net = copy.deepcopy(learner.net)
    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9)
    sums = Counter()
    for rows in ([*range(6)], [6, 7]):  # twice --batch-size 3
        logits, _ = net(data.strong(rows))
        set_loss = C.partial_cross_entropy(logits, data.candidates[rows])
        terms = {"set": set_loss, "entropy": C.negative_entropy(logits)}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums.update({name: term.item() for name, term in terms.items()})
    learner.net.eval()
    terms = C.warm_up_epoch(learner, data, cfg)
    assert terms == pytest.approx({name: total / 2 for name, total in sums.items()}, 1e-4)
    close(learner.net.fc.weight, net.fc.weight)
    assert learner.net.calls == [(6, True, True), (2, True, True)]

@pytest.mark.parametrize("count, sizes", [(6, [3, 3]), (7, [3, 3]), (8, [2, 3, 3]), (1, [])])
def test_random_batches_leaves_out_a_lone_row(count, sizes):
    rows = torch.arange(count) + 5
    batches = C.random_batches(rows, 3)
    assert sorted(len(batch) for batch in batches) == sizes
    drawn = [row for batch in batches for row in batch.tolist()]
    assert torch.cat(C.random_batches(torch.arange(99), 3)).tolist() != list(range(99))
    assert len({*drawn} & {*rows.tolist()}) == len(drawn) == count - (count % 3 == 1)

# (6) GMM split -----------------------------------------------------------------------------
def oracle_clean_probability(history):
    """A list of losses [N] -> w: each scaled to 0..1, a mixture of the mean of the last 5."""
    scaled = [(row - row.min()) / (row.max() - row.min()) for row in history[-5:]]
    values = (sum(scaled) / len(scaled)).numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    mixture.fit(values)
    lower = 0 if mixture.means_[0] < mixture.means_[1] else 1
    return torch.tensor(mixture.predict_proba(values)[:, lower])

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("losses, clean", [
    ([[0.1, 0.2, 0.1, math.inf]], [1, 1, 1, 0]), ([[2.0] * 6], [1] * 6), ([[1.0]], [1]),
    ([[3.0] * 5, [0.0] * 5], [1] * 5), ([[0.1] * 3, [0.1, 0.1, 4]], [1, 1, 0])])
def test_clean_probability_at_the_edge_whatever_the_order_of_rows(losses, clean):
    losses, clean = torch.tensor(losses), torch.tensor(clean)
    for order in (torch.arange(len(clean)), torch.randperm(len(clean))):
        prob = C.clean_probability(losses[:, order])
        assert prob.isfinite().all()
        assert torch.equal(prob > 0.5, clean[order] > 0)
        assert (prob == 1).all() or 0 in clean

@pytest.mark.parametrize("w, losses, classes, expected", [
    ([0.9, 0, 0.6, 0], [3, 1, 4, 2], [0, 0, 1, 1], [0, 0.75, 0, 0.75]),  # half of each class
    # Of classes of 1 and 4, two fifths, rounded up; the first is of the highest loss.
    ([0, 0.1, 1, 0.9, 0.3], [9, 4, 3, 2, 1], [7, 4, 4, 4, 4], [0.75, 0, 0, 0.9, 0.75]),
    ([0.5, 0.4, 0], [1, 2, 3], [0, 1, 0], [0, 0, 0])])  # Nothing is clean.
def test_balance_classes_by_hand(w, losses, classes, expected):
    given = torch.tensor(w, dtype=torch.float32)
    balanced = C.balance_classes(given, torch.tensor(losses) * 0.1, torch.tensor(classes))
    close(balanced, expected)
    close(given, w)

@pytest.mark.parametrize("sizes, clean, kept", [
    ([96, 2, 1, 1], 20, [20, 1, 1, 1]), ([100], 30, [30]), ([50, 50], 30, [15, 15]),
    ([70, 30], 1, [1, 1]), ([70, 30], 100, [70, 30])])
def test_balance_classes_keeps_a_share_of_each_class(sizes, clean, kept):
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    w = (torch.arange(100) < clean).float()
    balanced = C.balance_classes(w, torch.rand(100), classes)
    assert [(balanced[classes == k] > 0.5).sum() for k in range(len(sizes))] == kept

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", ["", "--ablate alignment", "--ablate split", "--balance"])
def test_split_data_equals_the_oracle_epoch_after_epoch(flags):
    learner = small_learner(settings())
    data = SmallData(600)
    history = []
    for _ in range(7):
        nn.init.normal_(learner.net.fc.weight)
        with torch.no_grad():
            views = [data.weak(rows) for rows in torch.arange(600).split(512)]
            expected = learner.net(torch.cat(views))[0].softmax(1)
        if flags != "--ablate alignment":
            expected = F.normalize(expected / expected.mean(0), p=1, dim=1)
        in_sets = expected.masked_fill(~data.candidates, 0)
        history.append(-in_sets.amax(1).log())
        w = torch.ones(600) if flags == "--ablate split" else oracle_clean_probability(history)
        if flags == "--balance":
            w = C.balance_classes(w, history[-1], in_sets.argmax(1))
        learner.net.train()
        learner.net.calls.clear()
        probs, clean_prob = C.split_data(learner, data, settings(flags))
        assert learner.net.calls == [(512, False, False), (88, False, False)]
        close(probs, expected)
        close(torch.stack(learner.losses), torch.stack(history[-5:]))
        close(clean_prob, w, 1e-3)

@pytest.mark.parametrize("count, batch, clean, tenth", [
    (5, 9, 0, 2), (35, 9, 2, 3), (49, 9, 3, 4), (9, 9, 2, 0), (40, 2, 2, 0)])
def test_split_data_takes_the_lowest_tenth(count, batch, clean, tenth, monkeypatch, capsys):
    given = torch.where(torch.arange(count) < clean, 0.8, 0.5)  # 0.5 is not clean.
    monkeypatch.setattr(C, "clean_probability", lambda history: given)
    learner = small_learner(settings())
    _, w = C.split_data(learner, SmallData(count), settings(f"--batch-size {batch}"))
    lowest = learner.losses[-1].argsort()[:tenth].tolist()
    close(w, [float(i in lowest) for i in range(count)] if tenth else given)
    numbers = re.findall(r"\d+", capsys.readouterr().out)
    assert numbers == ([str(clean), str(tenth)] if tenth else [])

# (7) Co-pseudo-labeling, sharpening, mixup -------------------------------------------------
def test_sharpen_by_hand():
    close(C.sharpen(torch.tensor([[0.6, 0.3, 0.1]]), 0.5), [[36 / 46, 9 / 46, 1 / 46]])
    close(C.sharpen(torch.tensor([[0.36, 0.64, 0]]), 2), [[3 / 7, 4 / 7, 0]])
    close(C.sharpen(torch.tensor([[1e-30, 5e-31, 0]]), 0.5), [[0.8, 0.2, 0]])

@pytest.mark.parametrize("partner, w, temperature, expected", [
    ([0.2, 0.6, 0.2], 0, 1, [0.5, 0.1, 0.4]), ([0.2, 0.6, 0.2], 0.8, 1, [0.3, 0.62, 0.08]),
    ([0.2, 0.6, 0.2], 1, 0.5, [0.1, 0.9, 0]), ([0, 0, 1.0], 1, 0.5, [0.5, 0.5, 0])])
def test_refine_labels_by_hand(partner, w, temperature, expected):
    own = torch.tensor([[0.5, 0.1, 0.4]] * 2)
    sets = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    both = torch.tensor([partner, [0, 0, 1.0]])  # In the last case both sets exclude the rest.
    labels = C.refine_labels(own, both, sets, torch.tensor([w, 1]), temperature)
    close(labels, [expected, [0, 0, 1.0]])

def test_labels_and_prototypes_pass_no_gradient():
    probs = random_probs(4, 3).requires_grad_()
    w = torch.full((4,), 0.4, requires_grad=True)
    sets = torch.ones(4, 3, dtype=torch.bool)
    results = [C.refine_labels(probs, probs, sets, w, 0.5), C.guess_labels(probs[None], 0.5),
        C.update_prototypes(torch.zeros(3, 3), probs, torch.tensor([0, 0, 1, 2]), 0.9)]
    assert not any(result.requires_grad for result in results)

def test_draw_mixup_draws_the_larger_part_of_beta_4_4_and_an_order():
    lams, orders = zip(*[C.draw_mixup(7) for _ in range(2000)])
    assert min(lams) >= 0.5 and abs(np.mean(lams) - (1 / 2 + 35 / 256)) < 0.008
    assert {tuple(order.sort()[0].tolist()) for order in orders} == {(0, 1, 2, 3, 4, 5, 6)}

def oracle_self_training(logits, targets, n, weight_u):
    """Eq. 8, row by row; the first n are clean."""
    rows = list(zip(logits, targets))
    losses = [-(y * row.log_softmax(0)).sum() for row, y in rows[:n]]
    errors = [((row.softmax(0) - y) ** 2).mean() for row, y in rows[n:]]
    return sum(losses) / n + weight_u * sum(errors) / max(1, len(errors))

# (8) Prototype EMA alignment ---------------------------------------------------------------
def oracle_prototypes(prototypes, embeddings, classes, momentum):
    moved = prototypes.clone()
    for z, k in zip(embeddings, classes):
        moved[k] = momentum * moved[k] + (1 - momentum) * z
    return torch.stack([row / max(row.norm(), 1e-12) for row in moved])

@pytest.mark.parametrize("num_u", [0, 2])
def test_prototype_loss_has_the_gradient_of_the_published_formula(num_u):
    similarity = torch.randn(3 + num_u, 4, requires_grad=True)
    a = torch.cat([torch.eye(4)[:3], random_probs(num_u, 4)])
    b = random_probs(3 + num_u, 4)
    published = 0
    for i, row in enumerate(similarity):
        q = (row / 0.3).softmax(0)
        for lam, y in ((0.8, a[i]), (0.2, b[i])):
            if i < 3:  # KL divergence
                published += lam * sum(t * (t / p).log() for t, p in zip(y, q) if t > 0) / 3
            else:
                published += 0.5 * lam * ((q - y) ** 2).mean() / num_u
    y = 0.8 * a + 0.2 * b
    loss = C.prototype_loss(similarity[:3], y[:3], similarity[3:], y[3:], 0.5)
    close(*[torch.autograd.grad(value, similarity)[0] for value in (loss, published)])

# (9) MoCo queue, noisy supervised contrastive loss -----------------------------------------
def test_MomentumQueue_keeps_the_newest_in_order():
    for size, kept in ((3, [2, 3, 4]), (9, [0, 1, 2, 3, 4]), (0, [])):
        queue = C.MomentumQueue(size, 2)
        for first, last in ((0, 2), (2, 2), (2, 5)):
            numbers = torch.arange(first, last)
            queue.push(numbers.half()[:, None].repeat(1, 2), numbers, numbers > 2)
        assert queue.classes.tolist() == queue.keys[:, 1].tolist() == kept
        assert queue.clean.tolist() == [number > 2 for number in kept]
        assert queue.keys.dtype == torch.float32

def oracle_contrast(features, classes, clean, num_anchors, temperature):
    loss = 0
    for i in range(num_anchors):
        total = 0
        positives = []
        for j in range(len(features)):
            own_key = j == i + num_anchors
            same = classes[i] == classes[j]
            ignored = same and not own_key and not (clean[i] and clean[j])
            if j != i and not ignored:
                similarity = features[i] @ features[j] / temperature
                total = total + similarity.exp()
                positives += [similarity] if same or own_key else []
        loss = loss + sum(total.log() - s for s in positives) / len(positives) / num_anchors
    return loss

@pytest.mark.parametrize("queued", [0, 6])
@pytest.mark.parametrize("clean_share", [0, 0.6, 1])
def test_supcon_loss_equals_the_oracle_inside_autocast_too(queued, clean_share):
    features = unit_rows(8 + queued, 3).requires_grad_()
    rows = [0, 1, 2, 3, *range(4 + queued)]  # A key has the class and the flag of its anchor.
    classes = torch.randint(3, (4 + queued,))[rows]
    clean = (torch.rand(4 + queued) < clean_share)[rows]
    masks = C.contrastive_masks(classes, clean, 4)
    expected = oracle_contrast(features, classes, clean, 4, 0.2)
    expected_grad = torch.autograd.grad(expected, features)[0]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = C.supcon_loss(features, *masks, 0.2)
        assert loss.dtype == torch.float32
        close(loss, expected)
        close(torch.autograd.grad(loss, features)[0], expected_grad)
    assert C.supcon_loss(features.half(), *masks, 0.2).dtype == torch.float32

@pytest.mark.parametrize("loss", [
    lambda x: C.partial_cross_entropy(x, x > 0), C.negative_entropy,
    lambda x: C.self_training_loss(x, x, x, x, 1), lambda x: C.prototype_loss(x, x, x, x, 1),
    lambda x: C.supcon_loss(x, torch.zeros(0, 0) > 0, torch.zeros(0, 0) > 0),
    lambda x: C.supcon_loss(torch.ones(4, 3), torch.zeros(0, 4) > 0, torch.zeros(0, 4) > 0)])
def test_losses_of_no_rows_are_zero(loss):
    close(loss(torch.zeros(0, 3)), 0.0)

# (10) Evaluation ---------------------------------------------------------------------------
def test_predict_is_the_mean_of_both_networks_in_eval_mode():
    learners = [small_learner(settings()), small_learner(settings())]
    mean, std = torch.tensor([0.4, 0.3]).view(2, 1, 1, 1, 1)
    images = make_pictures(600, 1, 2)
    expected = sum(learner.net((images / 255 - 0.4) / 0.3)[0] for learner in learners) / 2
    close(C.predict(learners, images, mean, std), expected)
    for learner in learners:
        assert learner.net.calls[1:] == [(512, False, False), (88, False, False)]

def test_class_shares_by_hand():
    """Class 0 is never predicted, no set names class 3, and a set of n labels counts 1/n."""
    logits = torch.eye(4)[[1, 1, 2, 3]]
    sets = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0]]).bool()
    close(C.class_shares(logits, sets), [0, 150, 600 / 11, 0])

def test_evaluate_by_hand():
    learners = [small_learner(settings()), small_learner(settings())]
    data = SmallData(4)
    data.candidates = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    logits = torch.eye(3)[[0, 1, 1, 2]]  # The shares are 200, 100 and 66.7 %.
    labels = torch.tensor([0, 1, 0, 2])
    health = {"least_share": pytest.approx(200 / 3), "least_class": "c"}
    def check(labels, flags, others):
        data.cfg = settings(flags)
        assert C.evaluate(learners, logits, data, labels, "abc") == health | others
    check(labels, "", {})
    learners[0].split = (logits, torch.tensor([0.9, 0.9, 0.9, 0.9]))
    learners[1].split = (logits, torch.tensor([0.9, 0.1, 0.6, 0.5]))  # 0.5 is not clean.
    check(labels, "", {"clean": 3, "split_precision": 62.5})
    check(labels - 1, "", {"clean": 3})
    check(labels, "--ablate mixup split", {})

# (11) Training -----------------------------------------------------------------------------
def fixed_mixup(count):
    return 0.5 + count / 30, torch.arange(count).roll(3)

def oracle_epoch(net, partner, split, prototypes, queue, data, cfg, batches):
    """Epoch 5 of co-training in loops over samples; the network is trained.
    -> sums of the terms, prototypes, key encoder, the queue [keys, classes, clean]."""
    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9)
    key_net = copy.deepcopy(net)
    sums = Counter()
    for step, (x, u) in enumerate(batches):
        rows = [*x, *x, *u, *u]
        n = 2 * len(x)
        weak = data.weak(rows)
        strong = data.strong(rows)
        with torch.no_grad():
            p, q = [model(weak)[0].softmax(1) for model in (net, partner)]
        # Targets of the first and second views, which stand at i and j.
        first = [*range(len(x)), *range(n, n + len(u))]
        second = [i for i in range(len(rows)) if i not in first]
        y = {}
        for i, j in zip(first, second):
            target = (p[i] + p[j] + q[i] + q[j]) / 4
            if i < n:
                r = split[0][rows[i]] * data.candidates[rows[i]]
                w = split[1][rows[i]]
                target = w * r / r.sum() + (1 - w) * (p[i] + p[j]) / 2
            target = target ** (1 / cfg.temperature)
            y[i] = target / target.sum()
            y[j] = y[i]
        classes = [y[i].argmax().item() for i in first]
        clean = [i < n or "supcon" in cfg.ablate for i in first]
        # Self-training and prototypes, on mixed images.
        lam, order = fixed_mixup(len(rows))
        lam = 1 if "mixup" in cfg.ablate else lam
        logits, z = net(lam * strong + (1 - lam) * strong[order])
        targets = [lam * y[i] + (1 - lam) * y[j] for i, j in enumerate(order.tolist())]
        weight_u = cfg.lambda_u * (5 + step / len(batches) - cfg.warm_up) / 16
        terms = {"self": oracle_self_training(logits, targets, n, weight_u)}
        if "prototype" not in cfg.ablate:
            z_x = net(weak)[1][: len(x)].detach()
            prototypes = oracle_prototypes(prototypes, z_x, classes, cfg.momentum)
            logits = z @ prototypes.T / 0.3
            loss = oracle_self_training(logits, targets, n, cfg.lambda_u)
            terms["prototype"] = cfg.proto_weight * loss
        for theta_key, theta in zip(key_net.parameters(), net.parameters()):
            theta_key.data = cfg.momentum * theta_key + (1 - cfg.momentum) * theta.detach()
        keys = key_net(strong[second])[1].detach()
        features = torch.cat([net(strong[first])[1], keys, queue[0]])
        entries = (features, classes + classes + queue[1], clean + clean + queue[2])
        loss = oracle_contrast(*entries, len(first), 0.07)
        terms["contrastive"] = cfg.contrastive_weight * loss
        queue = [torch.cat([queue[0], keys]), queue[1] + classes, queue[2] + clean]
        queue = [part[-7:] for part in queue]
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums.update({name: term.item() for name, term in terms.items()})
    return sums, prototypes, key_net, queue

@pytest.mark.parametrize("ablate", ["", "supcon", "prototype", "unlabeled", "mixup", "co-pl"])
def test_co_train_epoch_of_two_batches_equals_the_oracle(ablate, monkeypatch):
    monkeypatch.setattr(C, "random_batches", lambda rows, batch_size: rows.split(batch_size))
    monkeypatch.setattr(C, "draw_mixup", fixed_mixup)
    cfg = settings(ablate and f"--ablate {ablate}")
    data = SmallData(10)
    learner = small_learner(cfg)
    learner.queue.push(unit_rows(4, 5), torch.tensor([0, 1, 2, 0]), torch.arange(4) > 1)
    partner = learner if ablate == "co-pl" else small_learner(cfg)
    w = torch.tensor([0.9, 0.5, 0.6, 1, 0, 0.7, 0.1, 0.8, 0.2, 0.3])  # 0.5 is not clean.
    partner.split = (random_probs(10, 3), w)
    prototypes = unit_rows(3, 5)
    batches = [([0, 2, 3], [1, 4, 6]), ([5, 7], [8, 9])]
    if ablate == "unlabeled":
        batches = [(x, []) for x, _ in batches]
    net = copy.deepcopy(learner.net)
    partner_net = net if ablate == "co-pl" else partner.net
    queue = [learner.queue.keys, [0, 1, 2, 0], [False, False, True, True]]
    sums, moved, key_net, queue = oracle_epoch(
        net, partner_net, partner.split, prototypes, queue, data, cfg, batches)
    terms = C.co_train_epoch(learner, partner, prototypes, data, cfg, 5)
    assert terms == pytest.approx({name: total / 2 for name, total in sums.items()}, 1e-4)
    actual = [*learner.net.parameters(), *learner.key_net.parameters(), prototypes]
    actual += [learner.queue.keys, learner.queue.classes, learner.queue.clean]
    expected = [*net.parameters(), *key_net.parameters(), moved, *queue]
    for value, target in zip(actual, expected):
        close(value, target, 1e-4)

def test_co_train_epoch_passes_each_weak_view_once_and_in_the_right_mode():
    learner, partner = [small_learner(settings()) for _ in range(2)]
    partner.split = (random_probs(5, 3), torch.tensor([1, 0, 1, 0, 1]))
    learner.net.eval()
    C.co_train_epoch(learner, partner, torch.zeros(3, 5), SmallData(5), settings(), 5)
    weak = [(2, True, False), (2, True, False), (3, True, False), (3, True, False)]
    assert learner.net.calls == [*weak, (10, True, True), (5, True, True)]
    assert learner.key_net.calls == [(5, True, False)]
    assert {call[1:] for call in partner.net.calls} == {(False, False)}
    assert sum(call[0] for call in partner.net.calls) == 4
    for net in (partner.net, learner.key_net):
        assert all(weight.grad is None for weight in net.parameters())

@pytest.mark.parametrize("clean, other", [(2, 0), (2, 1), (9, 8), (9, 9), (3, 30), (17, 2)])
def test_co_train_epoch_finite_at_the_edge(clean, other):
    """Batches of one row, no or one unlabeled sample, prototypes all 0, an empty queue."""
    cfg = settings("--batch-size 8")
    learner, partner = [C.Learner(3, cfg, "cpu") for _ in range(2)]
    partner.split = (random_probs(clean + other, 3), torch.tensor([1.0] * clean + [0] * other))
    prototypes = torch.zeros(3, 128)
    data = make_data(make_pictures(clean + other, 1, 8), "")
    terms = C.co_train_epoch(learner, partner, prototypes, data, cfg, 5)
    assert sorted(terms) == ["contrastive", "prototype", "self"]
    values = [torch.tensor([*terms.values()]), prototypes, *learner.net.parameters()]
    assert all(value.isfinite().all() for value in values)

def test_cosine_lr_by_hand():
    assert C.cosine_lr(0, 0.2, 20) == pytest.approx(0.2)
    assert C.cosine_lr(5, 0.2, 20) == pytest.approx(2e-4 + 0.1998 * (2 + math.sqrt(2)) / 4)
    assert C.cosine_lr(20, 0.2, 20) == C.cosine_lr(35, 0.2, 20) == pytest.approx(2e-4)

@pytest.mark.parametrize("flags, partners, period", [
    ("--lr-period 0", [1, 0], 3), ("--lr-period 8 --ablate co-pl", [0, 1], 8)])
def test_train_epoch_gives_each_network_its_split(flags, partners, period, monkeypatch):
    cfg = settings(f"--epochs 3 {flags}")
    learners = [small_learner(cfg), small_learner(cfg)]
    used = []
    def co_train_epoch(learner, partner, prototypes, data, cfg, epoch):
        used.append([learners.index(learner), partner.split])
        assert learners[1].split is not None  # Both networks split before one of them learns.
        assert learner.optimizer.param_groups[0]["lr"] == C.cosine_lr(epoch, cfg.lr, period)
        return {"self": 2.0 + learners.index(learner)}
    monkeypatch.setattr(C, "split_data", lambda learner, data, cfg: learners.index(learner))
    monkeypatch.setattr(C, "co_train_epoch", co_train_epoch)
    monkeypatch.setattr(C, "warm_up_epoch", lambda learner, data, cfg: {"set": 1.0})
    assert C.train_epoch(learners, None, None, cfg, 0) == {"set": 1}
    assert C.train_epoch(learners, None, None, cfg, 1) == {"self": 2.5}
    assert used == [[0, partners[0]], [1, partners[1]]]

def move(module, device, memory_format):
    for part in module.modules():
        weights = {name: w for name, w in part._parameters.items() if w is not None}
        part._parameters |= {name: nn.Parameter(w.to(device)) for name, w in weights.items()}
        part._buffers |= {name: x.to(device) for name, x in part._buffers.items()}
    return module

def on_gpu(*tensors):
    assert {str(tensor.device) for tensor in tensors} == {"cuda:0"}

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("forgotten", [None, "MomentumQueue", "clean_probability"])
def test_training_on_a_GPU_mixes_no_devices(forgotten, monkeypatch):
    """Fake tensors have shapes and devices alone, so what depends on values is made up."""
    numbers = itertools.count()
    def made_up(mode, operation, x, *_):
        if operation == aten._local_scalar_dense.default:
            return next(numbers) % 8 or 1 if x.dtype == torch.long else 0.5
        with mode:
            rows = torch.zeros(5, dtype=torch.long, device=x.device)
            return rows[:, None] if operation == aten.nonzero.default else [rows] * 3
    def step(learner, terms):
        on_gpu(*terms.values())
        return {name: term.detach() for name, term in terms.items()}
    aten = torch.ops.aten
    for operation in (aten._local_scalar_dense, aten.nonzero, aten._unique2):
        operations = fake_impls.op_implementations_dict
        monkeypatch.setitem(operations, operation.default, made_up)
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(C.Learner, "step", step)
    place = "cpu" if forgotten == "clean_probability" else "cuda"
    monkeypatch.setattr(C, "clean_probability", lambda x: torch.ones(x.shape[1], device=place))
    if forgotten == "MomentumQueue":
        queue = C.MomentumQueue
        monkeypatch.setattr(C, forgotten, lambda size, dim, device: queue(size, dim))
    cfg = settings("""--device cuda --precision fp32 --balance --channels 3 --width 1
        --batch-size 2 --warm-up 0 --start-contrastive 0 --cutout 0 0.5""")
    expected = pytest.raises(RuntimeError, match="cpu") if forgotten else nullcontext()
    with expected, FakeTensorMode():
        images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8, device="cuda")
        sets = torch.ones(20, 3, dtype=torch.bool, device="cuda")
        data = C.WeakStrongImages(images, sets, cfg)
        *learners, restored = [C.Learner(3, cfg, cfg.device) for _ in range(3)]
        on_gpu(data.weak(torch.arange(4, device="cuda")))
        C.warm_up_epoch(learners[0], data, cfg)
        prototypes = torch.zeros(3, 128, device="cuda")
        terms = C.train_epoch(learners, prototypes, data, cfg, 1)
        assert sorted(terms) == ["contrastive", "prototype", "self"]
        logits = C.predict(learners, images, data.mean, data.std)
        probs = logits.softmax(1)
        w = (learners[0].split[1] + learners[1].split[1]) / 2
        queue = learners[0].queue
        restored.net.load_state_dict(learners[0].net.state_dict())
        restored.queue.push(queue.keys, queue.classes, queue.clean)
        on_gpu(C.class_shares(logits, sets), C.combine_answers(probs, sets.int()),
               C.refine_labels(probs, probs, sets, w, 1.0), restored.queue.keys)

# (12) Data sets ----------------------------------------------------------------------------
CAFE = "caf\u00e9"  # with one character for the accent; elsewhere with two

def read_folder(*flags):
    """-> training pairs, their names, test pairs, class names of the working folder."""
    return C.read_dataset(C.parse(["--dataset", "folder", "--data-dir", ".", *flags]))

@pytest.mark.parametrize("name", [*C.PRESETS][1:])
def test_main_says_which_data_are_missing_where(name, capsys):
    assert C.main(["--dataset", name, "--data-dir", "none/here", "--device", "cpu"]) == 2
    one_line(capsys, "none/here", "none/here/train" if name == "folder" else name)

RED = (250, 10, 20)
GREEN = (15, 240, 30)
WHITE = 255

def two_colours(mode="RGB"):
    """64 x 32 pixels: blue, red, green, blue; the centre square is red left of green."""
    image = Image.new("RGB", (64, 32), "blue")
    image.paste(RED, (16, 0, 32, 32))
    image.paste(GREEN, (32, 0, 48, 32))
    return image.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)

def shows(path, left, right):
    """open_image(path) must be the centre square, with these mean colours left and right."""
    image = C.open_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    pixels = np.asarray(image, float)
    assert abs(pixels[:, 2:14].mean((0, 1)) - left).max() <= 8
    assert abs(pixels[:, 18:30].mean((0, 1)) - right).max() <= 8

@pytest.mark.parametrize("mode, name, left, right", [
    ("RGB", "x.png", RED, GREEN), ("RGB", "x.webp", RED, GREEN), ("RGB", "x.jpg", RED, GREEN),
    ("CMYK", "x.jpg", RED, GREEN), ("RGBA", "x.png", RED, GREEN), ("P", "x.png", RED, GREEN),
    ("L", "x.png", 83, 149), ("LA", "x.png", 83, 149), ("1", "x.png", 0, 255)])
def test_open_image_makes_every_mode_rgb(mode, name, left, right):
    two_colours(mode).save(name)
    shows(name, left, right)

@pytest.mark.parametrize("mode, colours, options, left, right", [
    ("RGBA", [(0, 0, 0, 0), (200, 0, 0, 51)], {}, WHITE, (244, 204, 204)),
    ("LA", [(0, 0), (100, 51)], {}, WHITE, 224), ("P", [0, 1], {"transparency": 0}, WHITE, 9),
    ("P", [0, 1], {"transparency": b"\0\x33"}, WHITE, 206),
    ("RGB", [(0, 0, 0), RED], {"transparency": (0, 0, 0)}, WHITE, RED),
    ("L", [0, 90], {"transparency": 0}, WHITE, 90)])
def test_open_image_puts_transparent_parts_on_white(mode, colours, options, left, right):
    image = Image.new(mode, (32, 32), colours[0])
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.paste(colours[1], (16, 0, 32, 32))
    image.save("x.png", **options)
    shows("x.png", left, right)

@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_open_image_turns_it_upright_unless_exif_is_damaged():
    stored = two_colours().transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x0112] = 6  # stored turned to the left: to be shown turned to the right
    for name in ("x.jpg", "x.tif", "x.png"):
        stored.save(name, exif=exif)
        shows(name, RED, GREEN)
    for damaged in (b"junk, not TIFF", b"MM\0*\0\0\0\x08\0\x09\x01\x12"):
        two_colours().save("x.jpg", exif=b"Exif\0\0" + damaged)
        shows("x.jpg", RED, GREEN)

def test_open_image_lets_a_lack_of_memory_through(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda path: bytearray(1 << 62))
    with pytest.raises(MemoryError):
        C.open_image("x.png")

def labelled(pairs):
    return [(np.asarray(C.open_image(path)).item(0), label) for path, label in pairs]

def test_read_dataset_folder_leaves_out_hidden_names_and_sorts_class_after_class():
    """It follows links, but a dead one that is no image does not matter."""
    grey("train/cat/1.png", "train/cat/deep/er/2.bmp", "elsewhere/3.PNG", "test/dog/4.png")
    grey("train/.ipynb_checkpoints/5.png", "train/cat/._6.png", "train/cat/.thumbs/8.png")
    grey("test/.hidden/9.png", "train/__background__/10.png", "train/lost/11.png")
    grey("train/cat-2/12.png", "train/cat 3/13.png", "train/cat/c.14.png")
    Path("train/dog").symlink_to("../elsewhere")
    Path("train/cat/seen").symlink_to("../../elsewhere")
    Path("train/cat/notes.txt").symlink_to("nowhere")
    train, names, test, class_names = read_folder()
    assert class_names == ["__background__", "cat", "cat 3", "cat-2", "dog", "lost"]
    order = [(10, 0), (1, 1), (14, 1), (2, 1), (3, 1), (13, 2), (12, 3), (3, 4), (11, 5)]
    assert [labelled(train), labelled(test)] == [order, [(4, 4)]]
    assert names[2:5] == ["cat/c.14.png", "cat/deep/er/2.bmp", "cat/seen/3.PNG"]

@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed, text", [("p/train/b", "p/train/b"), ("run", "be written")])
def test_main_as_another_user_names_a_closed_folder(closed, text, capfd, monkeypatch):
    forbid_clip(monkeypatch)
    grey("p/train/a/1.png", "p/train/b/2.png", "run/more/3.png")
    Path().chmod(0o755)
    Path(closed).chmod(0o555 if closed == "run" else 0)
    process = os.fork()
    if not process:
        try:
            os.setuid(65534)
            code = C.main("--dataset folder --data-dir p --output-dir run".split())
            sys.stderr.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    one_line(capfd, text)

def test_read_dataset_folder_with_classes_has_no_labels_at_any_depth():
    """Accents in one character or two, and blanks around a name, make no other class."""
    apart = "cafe\u0301"
    grey("train/0.png", f"train/{apart}/deep/1.png", "train/dog /2.png")
    grey(f"test/{CAFE}/3.png", "test/dog/4.png")
    train, names, test, class_names = read_folder("--classes", f"dog, {apart} ")
    assert class_names == ["dog", CAFE]
    assert names == ["0.png", f"{CAFE}/deep/1.png", "dog /2.png"]
    assert [labelled(train), labelled(test)] == [[(0, -1), (1, -1), (2, -1)], [(3, 1), (4, 0)]]
    Path("train/0.png").unlink()
    train, _, test, class_names = read_folder()
    assert class_names == [CAFE, "dog"]
    assert labelled([*train, *test]) == [(1, 0), (2, 1), (3, 0), (4, 1)]

def test_read_images_names_broken_files_and_leaves_them_out(capsys):
    grey("train/cat/1.png", "train/dog/2.png")
    write(Path("train/cat/cut.png"), Path("train/cat/1.png").read_bytes()[:50])
    write(Path("train/cat/deep.png"), np.full((8, 8), 999, np.uint16))
    Path("train/cat/junk.jpg").write_bytes(b"junk")
    Image.new("F", (8, 8)).save("train/cat/F.tif")
    argv = ["--dataset", "folder", "--data-dir", str(Path.cwd()), "--channels", "1"]
    rows, images, labels = C.read_images(C.read_dataset(C.parse(argv))[0], C.parse(argv), 2)
    assert rows == [0, 5]
    assert [*images.shape, *images[:, 0, 0, 0], *labels] == [2, 1, 32, 32, 1, 2, 0, 1]
    left_out = re.findall(r"(\w+)\.\w+: expected", capsys.readouterr().err)
    assert sorted(left_out) == ["F", "cut", "deep", "junk"]
    for path in ("train/cat/1.png", "train/dog/2.png"):
        Path(path).write_bytes(b"")
        refused(capsys, [*argv, "--device", "cpu"], "expected 2 images")

def test_read_images_joins_the_rows_of_all_batches():
    pairs = [(Image.new("L", (8, 8), i // 2), i) for i in range(300)]
    pairs[7] = pairs[280] = (Path("none.png"), 0)
    rows, images, labels = C.read_images(pairs, C.parse([]))
    assert rows == labels.tolist() == [i for i in range(300) if i not in (7, 280)]
    assert images[:, 0, 0, 0].tolist() == [i // 2 for i in rows]

@pytest.mark.parametrize("paths, text", [
    ("", "/train"), ("test/a/1.png", "/train"), ("train/a/1.png train/a/2.png", "'a']"),
    ("train/3.png", "none beside them"), ("test/c/3.png", "'b'], got ['c']"),
    ("test/3.png", "'b'], got ['']"), ("train/emu/3.heic", "['emu']"),
    ("train/link", "train/link: "), ("test", "test: ")])
def test_main_refuses_a_folder_without_use(paths, text, capsys):
    if paths and text not in ("/train", "'a']"):
        grey("train/a/1.png", "train/b/2.png")
    for path in paths.split():
        if "." in path:
            grey(path)
        else:
            Path(path).symlink_to("nowhere")
    refused(capsys, ["--dataset", "folder", "--data-dir", Path.cwd(), "--device", "cpu"], text)

def test_read_dataset_holds_out_the_same_fifth_and_draws_samples():
    train, names, test, _ = C.read_dataset(C.parse([]))
    assert [len(train), len(test)] == [1438, 359]
    assert sorted(train.indices + test.indices) == list(range(1797))
    assert names == [str(row) for row in train.indices]
    few, names, same, _ = C.read_dataset(C.parse(["--num-samples", "20", "--seed", "3"]))
    assert same.indices == test.indices
    assert len(few) == 20
    assert few.indices == sorted({*few.indices} & {*train.indices})
    assert names == [str(row) for row in few.indices]

HEAD = "path,label\n"

@pytest.mark.parametrize("text, votes, others", [
    (f"{HEAD}a/1.png,cat\nb.png,cat\na/1.png,cat\nb.png,{CAFE}", [[2, 0], [1, 1], [0, 0]], 0),
    (f"\ufeff{HEAD}b.png,cat\r\n", [[0, 0], [1, 0], [0, 0]], 0),
    (f"{HEAD} {CAFE}, cafe\u0301 \ncafe\u0301 ,cat", [[0, 0], [0, 0], [1, 1]], 0),
    (f"{HEAD}b.png,\na/1.png\n\nb.png,cat", [[0, 0], [1, 0], [0, 0]], 0),
    (f"sure,label,path\n9,cat,b.png\n8,{CAFE},b.png,more", [[0, 0], [1, 1], [0, 0]], 0),
    (f"{HEAD}x.png,cat\nb.png,cat\n1.png,\n", [[0, 0], [1, 0], [0, 0]], 2),
    (f'{HEAD}"a/1.png","cat"', [[1, 0], [0, 0], [0, 0]], 0)])
def test_read_annotations_by_hand(text, votes, others, capsys):
    Path("a.csv").write_bytes(text.encode())
    found = C.read_annotations("a.csv", ["a/1.png", "b.png", CAFE], ["cat", CAFE])
    assert found.tolist() == votes
    empty = votes.count([0, 0])
    said = f"{others} lines are of other images; {empty} images have no answer\n"
    assert capsys.readouterr().out.endswith(": " + said)

@pytest.mark.parametrize("content, texts", [
    (f"{HEAD}a.png,cat\nb.png,cow", ["line 3", "'cow'", "['cat', 'dog']"]),
    (f"{HEAD}a.png,Cat", ["line 2", "'Cat'"]), (f"{HEAD}x.png,cow", ["line 2", "'cow'"]),
    (f"{HEAD}./a.png,cat", ["such as 'a.png'"]), (f"{HEAD}a.png,", ["such as 'a.png'"]),
    ("path,name\na.png,cat", ["label", "commas"]), ("image,label\na.png,cat", ["path"]),
    ("path;label\na.png;cat", ["path and label between commas"]), ("", ["expected"]),
    (f"{HEAD}caf\u00e9.png,cat".encode("latin1"), ["UTF-8"]), (b"PK\3\4\xff", ["UTF-8"]),
    (HEAD + '"' + 200_000 * "a", ["CSV"])])
def test_read_annotations_says_what_was_expected(content, texts):
    Path("a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(C.UserError, match="^a.csv") as caught:
        C.read_annotations("a.csv", ["a.png", "b.png"], ["cat", "dog"])
    assert all(text in str(caught.value) for text in texts)

def oracle_combine(probs, votes, rounds, hard_share):
    """Bayes' rule, image by image, for the K classes of easy, then for those of hard ones."""
    K = len(probs[0])
    prior = [[share * max(p, 1e-6) for share in (1 - hard_share, hard_share) for p in row]
             for row in probs]
    labels = [[*vote, *K * [0]] for vote in votes]
    for _ in range(rounds):
        counts = [[sum(row[k] * vote[j] for row, vote in zip(labels, votes)) for j in range(K)]
                  for k in range(2 * K)]
        right = sum(counts[k][k] for k in range(K)) / max(1, sum(map(sum, counts[:K])))
        a = min(max(right, 0.001), 0.999)
        chances = [[a if j == k else (1 - a) / (K - 1) for j in range(K)] for k in range(K)]
        chances += [[(c + 100 / K) / (sum(row) + 100) for c in row] for row in counts[K:]]
        labels = []
        for row, vote in zip(prior, votes):
            joint = [p * math.prod(c**v for c, v in zip(chance, vote))
                     for p, chance in zip(row, chances)]
            labels.append([value / sum(joint) for value in joint])
    return [[row[k] + row[K + k] for k in range(K)] for row in labels]

def test_combine_answers_of_a_round_by_hand():
    """a = (1 + 4) / 9: how often two answers agree; each weighs a * 2 / (1 - a) = 2.5."""
    labels = C.combine_answers(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1, 2, 0]]), 1)
    close(labels * 3.325, [[0.5 * 2.5, 0.3 * 2.5**2, 0.2]])
    probs = torch.tensor([[0.4, 0.3, 0.3], [1, 0, 0]])
    labels = C.combine_answers(probs, torch.tensor([[1, 0, 0], [99, 0, 0]]))
    close(labels[0, 0], 799.2 / 799.8)  # a is 0.999 at most, so an answer weighs 1998.
    one_class = torch.tensor([[0.9, 0.1]]).repeat(2, 1)  # predictions that must not mislead
    assert C.combine_answers(one_class, 3 * torch.eye(2)).argmax(1).tolist() == [0, 1]

@pytest.mark.parametrize("rounds", [1, 2, 10])
@pytest.mark.parametrize("most", [0, 1, 4])
@pytest.mark.parametrize("hard_share", [0.0, 0.1])
def test_combine_answers_equals_the_oracle(rounds, most, hard_share):
    probs = random_probs(9, 3)
    probs[0] = torch.tensor([1.0, 0, 0])
    votes = torch.randint(most + 1, (9, 3), dtype=torch.int32)
    labels = C.combine_answers(probs, votes, rounds, hard_share)
    close(labels, oracle_combine(probs.tolist(), votes.tolist(), rounds, hard_share))
    assert most or (labels - probs).abs().max() < 1e-5  # Nobody said anything.

def test_combine_answers_sees_through_a_favourite_mistake():
    """Of 800 images the last 200 get answers of the next class with chance 0.6."""
    classes = torch.arange(800) % 4
    answers = torch.where(torch.rand(5, 800) < 0.9, classes, torch.randint(4, (5, 800)))
    is_mistake = (torch.rand(5, 800) < 0.6) & (torch.arange(800) >= 600)
    answers = torch.where(is_mistake, (classes + 1) % 4, answers)
    votes = F.one_hot(answers, 4).sum(0)  # [N,K]
    predicted = torch.where(torch.rand(800) < 0.7, classes, torch.randint(4, (800,)))
    probs = 0.1 + 0.6 * F.one_hot(predicted, 4)
    one_coin = C.accuracy(C.combine_answers(probs, votes), classes)
    assert C.accuracy(C.combine_answers(probs, votes, hard_share=0.1), classes) > one_coin + 5

# (13) The command line ---------------------------------------------------------------------
PAPER = {  # the settings of the published run on CIFAR-10
    "epochs": 800, "warm_up": 50, "start_contrastive": 10, "lr": 0.01,
    "batch_size": 256, "width": 64, "lr_period": 800, "image_size": 32, "channels": 3,
    "temperature": 0.5, "lambda_u": 1, "proto_weight": 0.1, "contrastive_weight": 0.1,
    "momentum": 0.999, "queue_size": 8192, "templates": "small", "synthetic": None,
    "clip_model": "ViT-B-32-quickgelu", "clip_pretrained": "openai", "mirror": True,
    "cutout": [0, 0.5], "balance": False, "ablate": []}
FOLDER = {"width": 16, "epochs": 24, "warm_up": 8, "start_contrastive": 5, "lr": 0.05,
    "batch_size": 20, "lr_period": 0}
DIFFERENCES = {"cifar10": {}, "cifar100": {"warm_up": 100}, "svhn": {"mirror": False},
    "fmnist": {"channels": 1, "epochs": 100, "image_size": 28, "cutout": [16 / 28, 16 / 28]},
    "eurosat": {"image_size": 64, "epochs": 100},
    "gtsrb": {"image_size": 64, "epochs": 100, "mirror": False}, "cifar10 --annotations a": {},
    "folder": FOLDER, "folder --annotations a": FOLDER | {"ablate": ["mixup", "split"]}}

@pytest.mark.parametrize("words", DIFFERENCES)
def test_parse_takes_the_settings_of_the_data_set(words):
    found = vars(C.parse(f"--dataset {words}".split()))
    assert {key: found[key] for key in PAPER} == PAPER | DIFFERENCES[words]
    assert re.fullmatch(rf"runs/{words.split()[0]}-seed0-\d{{8}}-\d{{6}}", found["output_dir"])

def save_run(folder, **settings):
    """A checkpoint that has nothing but names and the settings of a run on digits."""
    Path(folder).mkdir()
    saved = vars(C.parse(["--output-dir", str(folder)])) | settings
    torch.save({"settings": saved, "names": []}, f"{folder}/checkpoint.pt")

@pytest.mark.parametrize("words", """--epochs 0; --epochs ten; --lr nan; --lr inf; --cutout 1;
    --momentum 7; --momentum 1; --synthetic 30 10; --cutout 16 16; --epoch 3; --ablate gmm;
    --batch-size 1; --epochs 10 --warm-up 30; --epochs 2; --seed -1; --classes a,b;
    --synthetic 0.1 0.1 --annotations a.csv; --synthetic 0 0 --dataset folder --classes a,b;
    --ablate split --balance; --annotations a --dataset folder --balance; --dataset cifra10;
    --channels 2; --resume run --output-dir other; --resume run --seed 1; --mirror 0;
    --resume run --annotations a.csv; --resume run --width 8; --resume run --dataset svhn;
    --resume run --channels 3; --resume run --synthetic 0.1 0.2; --resume run --classes a,b;
    --resume run --num-samples 9; --resume run --clip-model a; --resume run --templates a;
    --resume run --clip-pretrained a; --resume run --image-size 9;
    --num-samples 1; --image-size 7; --resume run --queue-size 9""".split(";"))
def test_parse_refuses_a_bad_word_and_names_the_flag(words, capsys):
    save_run("run")
    before = contents()
    with pytest.raises(SystemExit, match="^2$"):
        C.main(words.split())
    flag = "arguments: 0" if "mirror" in words else re.findall("--[a-z-]+", words)[-1]
    assert re.search(f"{flag}([ :]|$)", capsys.readouterr().err.splitlines()[1])  # 0: usage
    assert contents() == before

def test_parse_resume_takes_new_settings_of_training_and_the_device_of_the_machine():
    save_run("run", device="cuda:7", lr=0.3, width=4, ablate=["mixup"], mirror=True)
    cfg = C.parse("--resume run --epochs 30 --balance".split())
    assert [cfg.epochs, cfg.balance, cfg.ablate] == [30, True, ["mixup"]]
    assert [cfg.lr, cfg.width, cfg.batch_size, cfg.mirror] == [0.3, 4, 64, True]
    assert cfg.device == C.parse([]).device

def test_parse_resume_takes_back_switches_and_ablations():
    save_run("run", balance=True, ablate=["mixup"], mirror=True)
    cfg = C.parse("--resume run --no-balance --no-mirror --ablate".split())
    assert [cfg.balance, cfg.ablate, cfg.mirror] == [False, [], False]

def test_parse_help_shows_every_flag_with_the_default_of_the_run(capsys):
    settings = vars(C.parse([]))
    with pytest.raises(SystemExit, match="^0$"):
        C.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert " --balance, --no-balance " in said
    assert "if it is not given, at most a twentieth of all images" in said
    for name in settings.keys() - {"balance", "batch_fits", "epochs_fit", "output_dir"}:
        default = re.escape(f"({settings[name]})")
        assert re.search(rf"--(no-)?{name.replace('_', '-')} ((?! --).)*{default}", said), name

# (14) The run ------------------------------------------------------------------------------
COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
FLAGS = """--image-size 8 --width 4 --epochs 3 --warm-up 1 --lr 0.05 --start-contrastive 0
    --lr-period 4 --queue-size 64 --momentum 0.9 --device cpu --precision fp32 --ablate"""
NEED_LABELS = {"test_acc", "split_precision"}
FILES = ["annotations.csv", "checkpoint.pt", "labels.csv", "metrics.jsonl"]

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """36 small photos of three colours with noise, and 9 more to test with."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        for i in range(15):
            pixels = colour + np.random.default_rng(i).integers(-25, 25, (12, 10, 3))
            part = "train" if i < 12 else "test"
            write(root / part / name / f"{i:02}.png", pixels.astype(np.uint8))
    return root

@pytest.fixture(scope="module")
def words(photos, small_clip):
    argv = ["--dataset", "folder", "--data-dir", str(photos), "--output-dir", "run"]
    return [*argv, *small_clip, *FLAGS.split()]

@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """The folder of a whole run, where a job's log lay before."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    write(folder / "log.txt", b"a job's log")
    assert C.main([*words, "--output-dir", str(folder)]) == 0
    return folder

def metrics(folder, left_out=frozenset()):
    """The records of a run without what the clock says."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return [{k: v for k, v in record.items() if k not in left_out} for record in records]

def forbid_clip(monkeypatch):
    monkeypatch.setattr(C, "load_clip", lambda *args: pytest.fail("CLIP was loaded"))

def rows_of(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return [tuple(row) for row in csv.reader(file)][1:]

def votes_of(folder):
    """The numbers of answers in a run's checkpoint, {(name, label): number}."""
    saved = C.read_checkpoint(folder)
    pairs = itertools.product(saved["names"], saved["class_names"])
    return +Counter(dict(zip(pairs, saved["votes"].flatten().tolist())))

def no_training(monkeypatch):
    """-> list of the data of every epoch; both networks stay as they are."""
    seen = []
    monkeypatch.setattr(C, "train_epoch", lambda *args: seen.append(args[2]) or {"set": 1.0})
    return seen

def write_answers(path, answers):
    Path(path).write_text(HEAD + "".join(f"{name},{label}\n" for name, label in answers))

def test_main_writes_four_files_and_records_every_epoch(finished):
    assert sorted(os.listdir(finished)) == sorted([*FILES, "log.txt"])
    assert Path(finished, "log.txt").read_bytes() == b"a job's log"
    assert Path(finished, "labels.csv").read_bytes()[:3] == b"\xef\xbb\xbf"  # for Excel
    terms = [{"set", "entropy"}, {"self"}, {"self", "prototype", "contrastive"}]
    for i, (record, names) in enumerate(zip(metrics(finished), terms, strict=True)):
        others = set(record) - names - {"epoch", "phase", "loss"}
        split = {"clean", "split_precision"} if i else set()
        assert others == {"test_acc", "least_share", "least_class"} | split
        assert all(0 <= record[name] <= 100 for name in others - {"least_class"})
        assert record["loss"] == pytest.approx(sum(record[name] for name in names))
        phase = "co-train" if i else "warm-up"
        assert (record["epoch"], record["phase"]) == (i + 1, phase)
        assert 0 < record.get("clean", 1) <= 36
        assert record["least_class"] in COLOURS

def test_main_prints_a_log_with_labels(words, capsys):
    assert C.main([*words, "--epochs", "2"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("split: ")]
    *head, setting, title, first, second, end, result = lines
    assert head[:3] == ["3 classes: blue, green, red", "results go to run",
                        "folder: 36 training, 9 test images, on cpu"]
    assert [line.split(":")[0] for line in head[3:]] == [
        "the annotator, the mean of its templates, is right in*", "candidate sets",
        "sets without the true label*"]
    assert setting == "width 4 batch 8 epochs 2 warm-up 1 lr 0.05 balance False ablate []"
    assert title == "epoch    phase    loss   clean   test% right*% seconds  least share"
    for line, record in zip((first, second), C.read_checkpoint("run")["records"]):
        cells = [record.get(name) for name in "clean test_acc split_precision seconds".split()]
        cells = " ".join("      -" if cell is None else f"{cell:7.1f}" for cell in cells)
        health = f"{record['least_share']:.0f} % of {record['least_class']}"
        head = f"    {record['epoch']} {record['phase']:>8} {record['loss']:7.4f}"
        assert line == f"{head} {cells}  {health}"
    assert end == "finished after epoch 2, see labels.csv in run"
    assert result == f"result: {record['test_acc']:.1f} % of test images right"

@pytest.mark.parametrize("num, flags, epochs, warm_up", [
    (36, "", 144, 48), (36, "--epochs 30", 30, 8), (36, "--warm-up 24", 24, 24),
    (121, "--dataset digits", 20, 8), (120, "--dataset digits --lr-period 3", 40, 16)])
def test_main_epochs_fit_few_images(num, flags, epochs, warm_up, photos, monkeypatch, capsys):
    no_training(monkeypatch)  # The resume multiplies nothing again.
    argv = f"--dataset folder --data-dir {photos} --width 4 --synthetic 0 0 --output-dir run"
    assert C.main([*argv.split(), "--num-samples", str(num), *flags.split()]) == 0
    assert C.main(["--resume", "run"]) == 0
    said = re.findall(r" epochs (\d+) warm-up (\d+) ", capsys.readouterr().out)
    assert said == [(str(epochs), str(warm_up))] * 2
    assert C.read_checkpoint("run")["settings"]["lr_period"] == 6 * ("period" in flags)

@pytest.mark.parametrize("flags, size", [
    ("", 8), ("--batch-size 9", 9), ("--batch-size 4", 4), ("--dataset digits", 64),
    ("--dataset digits --num-samples 200", 10)])
def test_main_batch_fits_unless_it_is_given(flags, size, words, monkeypatch, capsys):
    no_training(monkeypatch)
    argv = [*words, "--channels", "1", "--epochs", "1", "--synthetic", "0.3", "0"]
    for more in ([*argv, *flags.split()], ["--resume", "run", "--epochs", "2"]):
        assert C.main(more) == 0
        assert f"batch {size} " in capsys.readouterr().out
    for flags in ("--batch-size 20", ""):  # The second resume keeps what the first was given.
        assert C.main(f"--resume run --epochs 3 {flags}".split()) == 0
        assert "batch 20 " in capsys.readouterr().out

def test_main_counts_the_images_that_can_be_read(words, photos, monkeypatch, capsys):
    no_training(monkeypatch)
    shutil.copytree(photos, "p")
    for path in [*sorted(Path("p/test").rglob("*.png"))[1:], Path("p/train/green/03.png")]:
        write(path, b"junk")
    assert C.main([*words, "--data-dir", "p"]) == 0
    assert "folder: 35 training, 1 test images" in capsys.readouterr().out
    names = {f"{name}/{i:02}.png" for name in COLOURS for i in range(12)} - {"green/03.png"}
    for path in ("run/labels.csv", "run/annotations.csv"):
        assert {row[0] for row in rows_of(path)} == names

@pytest.mark.parametrize("flags", [[], ["--classes", "blue,green,red"]])
def test_main_never_trains_on_labels(flags, words, photos, finished, capsys):
    """The same images in the same order, below folders of which many name a wrong class."""
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))):
        name = "blue" if i < 6 else "green" if i < 30 else "red"
        write(Path("p", "train", name, f"{i:02}.png"), path.read_bytes())
    assert C.main([*words, "--data-dir", "p", *flags]) == 0
    assert metrics("run", NEED_LABELS) == metrics(finished, NEED_LABELS)
    labels = [rows_of(f"{folder}/labels.csv") for folder in ("run", finished)]
    assert [row[1:] for row in labels[0]] == [row[1:] for row in labels[1]]
    out = capsys.readouterr().out
    assert "36 training, 0 test images" in out
    assert ("*:" in out) == (not flags)  # * marks what needs labels.
    *_, last, end = [line.split() for line in out.splitlines()]
    assert [last[4], last[-2], end[0]] == ["-", "of", "finished"]
    assert (last[5] == "-") == ("split_precision" not in metrics("run")[-1]) == bool(flags)

@pytest.mark.parametrize("parts", [
    "co-pl", "supcon", "prototype", "unlabeled", "mixup", "alignment", "split", "split mixup"])
def test_main_each_ablation_changes_the_numbers(parts, words, finished, capsys):
    assert C.main([*words, "--ablate", *parts.split()]) == 0
    assert metrics("run")[0] == metrics(finished)[0]
    *_, last = metrics("run")
    assert last != metrics(finished)[-1]
    assert ("prototype" in last) == ("prototype" not in parts)
    assert ("clean" in last) == ("split_precision" in last) == ("split" not in parts)
    assert {"least_share", "least_class"} <= {*last}
    cells = capsys.readouterr().out.splitlines()[-3].split()
    assert (cells[3] == cells[5] == "-") == ("split" in parts)

@pytest.mark.parametrize("flags", ["", "--classes red,blue,green", "--num-samples 20"])
def test_main_answers_of_a_run_serve_another(flags, words, finished, monkeypatch):
    """Some count twice, an image has none; then the other run's own file serves a third."""
    forbid_clip(monkeypatch)
    seen = no_training(monkeypatch)
    lines = rows_of(finished / "annotations.csv")
    assert Counter(lines) == votes_of(finished)
    lines = [line for line in lines + lines[::3] if line[0] != "red/03.png"]
    write_answers("a.csv", lines)
    argv = [*words, "--epochs", "1", *flags.split(), "--annotations"]
    assert C.main([*argv, "a.csv"]) == 0
    assert C.main([*argv, "run/annotations.csv", "--output-dir", "b"]) == 0
    saved = C.read_checkpoint("run")
    names = saved["names"]
    assert len(names) == (20 if "20" in flags else 36)
    expected = Counter(line for line in lines if line[0] in names)
    assert votes_of("run") == votes_of("b") == expected
    rated = [name for name, _ in expected]
    sets = [[name not in rated or (name, label) in expected for label in saved["class_names"]]
            for name in names]
    assert [data.candidates.tolist() for data in seen] == [sets, sets]

def test_main_csv_files_keep_odd_names(monkeypatch):
    folders = ['say "cat", twice', "two\nlines", f" {CAFE}", "cafe\u0301 s"]
    files = ["a,b.png", "c\r\nd.png", "'e;f'.png", "cafe\u0301.png", "\u4e2d.png", '".png']
    for folder, name in itertools.product(folders, files):
        write(Path("p/train", folder, name), np.zeros((8, 8), np.uint8))
    no_training(monkeypatch)
    argv = f"--dataset folder --data-dir p {FLAGS} --epochs 1".split()
    assert C.main([*argv, "--synthetic", "0.5", "0.5", "--output-dir", "a"]) == 0
    assert C.main([*argv, "--annotations", "a/annotations.csv", "--output-dir", "b"]) == 0
    assert votes_of("a") == votes_of("b")
    names = {f"{folder}/{name}".strip().replace("cafe\u0301", CAFE)
             for folder, name in itertools.product(folders, files)}
    for path in ("a/annotations.csv", "b/annotations.csv", "a/labels.csv"):
        assert {row[0] for row in rows_of(path)} == names

@pytest.mark.parametrize("flags, kind", [
    ("", "set"), ("--synthetic 0.4 0.2 --balance", "set"), ("--epochs 1", "prediction"),
    ("--ablate split", "prediction"), ("--annotations a.csv", "answers"),
    ("--annotations a.csv --warm-up 2", "answers")])
def test_main_labels_are_those_of(flags, kind, words, photos, finished, monkeypatch):
    write_answers("a.csv", 2 * rows_of(finished / "annotations.csv")[::2])
    splits = []
    real = C.split_data
    monkeypatch.setattr(C, "split_data", lambda *x: splits.append(real(*x)) or splits[-1])
    assert C.main([*words, "--epochs", "2", *flags.split()]) == 0
    saved = C.read_checkpoint("run")
    votes = saved["votes"].tolist()
    class_names, classify = C.load_classifier("run")
    probs = classify([Image.open(photos / "train" / name) for name in saved["names"]]).tolist()
    labels = oracle_combine(probs, votes, 10, 0.1) if kind == "answers" else probs
    if kind == "set":
        labels = []
        for p, counts, *w in zip(probs, votes, splits[-2][1].tolist(), splits[-1][1].tolist()):
            r = [q if count else 0 for q, count in zip(p, counts)]
            w = sum(w) / 2
            labels.append([w * a / sum(r) + (1 - w) * q for a, q in zip(r, p)])
    names, found, chances = zip(*rows_of("run/labels.csv"))
    assert [*names] == saved["names"]
    best = [max(row) for row in labels]
    close([float(chance) for chance in chances], best, 6e-4)
    close([row[class_names.index(name)] for row, name in zip(labels, found)], best)
    assert kind == "prediction" or max(a - max(p) for a, p in zip(best, probs)) > 0.01

@pytest.mark.parametrize("name, number, left", [
    ("warm_up_epoch", 1, 0), ("co_train_epoch", 1, 1), ("co_train_epoch", 4, 2)])
def test_main_resumes_after_ctrl_c(name, number, left, words, finished, monkeypatch, capsys):
    """It strikes at the end of the given call of a function; then the folder is moved."""
    real = getattr(C, name)
    calls = []
    def stopped(*args):
        calls.append(real(*args))
        if len(calls) == number:
            raise KeyboardInterrupt
        return calls[-1]
    monkeypatch.setattr(C, name, stopped)
    assert C.main(words) == 130
    one_line(capsys, "interrupted", "--resume run")
    assert len(metrics("run")) == left
    assert Path("run/labels.csv").exists() == (left > 0)
    forbid_clip(monkeypatch)
    Path("run").rename("moved")
    if left:
        before = contents()
        assert C.main(["--resume", "moved", "--epochs", str(left)]) == 0
        assert contents() == before
    assert C.main(["--resume", "moved", "--epochs", "3"]) == 0
    assert metrics("moved") == metrics(finished)
    for name in ("annotations.csv", "labels.csv"):
        assert Path("moved", name).read_bytes() == Path(finished, name).read_bytes()
    assert not Path("run").exists()

def test_main_killed_before_its_first_checkpoint_leaves_a_usable_folder(words, monkeypatch):
    no_training(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "annotate", lambda *args: signal.raise_signal(signal.SIGINT))
        assert C.main(words) == 130
    assert C.main(words) == 0

def test_main_resume_of_a_finished_run_changes_nothing_and_takes_more_epochs(
        finished, photos, capsys):
    shutil.copytree(finished, "run")
    before = contents()
    for flags in ([], ["--epochs", "3"], ["--epochs", "1", "--lr", "0.5"]):
        assert C.main(["--resume", "run", *flags]) == 0
        assert "finished after epoch 3" in capsys.readouterr().out
        assert contents() == before
    shutil.copytree(photos, "p")
    pixels = np.asarray(Image.open("p/train/red/07.png"))
    write(Path("p/train/red/07.png"), pixels + np.uint8(2))  # as another decoder might
    assert C.main("--resume run --data-dir p --epochs 4 --balance".split()) == 0
    assert metrics("run")[:-1] == metrics(finished)
    assert C.read_checkpoint("run")["settings"]["balance"]

@pytest.mark.parametrize("flags, text", [
    ("--resume run --data-dir p", "--data-dir p"), ("--resume run --device tpu", "tpu"),
    ("--resume run --data-dir q", "--data-dir q"), ("--output-dir run", "--resume"),
    ("--resume nowhere", "nowhere"), ("--resume run --data-dir few", "--data-dir few"),
    *[(f"--output-dir only/{name}", name) for name in FILES]])
def test_main_refuses_what_does_not_fit_the_run(flags, text, finished, photos, capsys):
    shutil.copytree(finished, "run")
    for folder in ("p", "q", "few"):
        shutil.copytree(photos / "train", f"{folder}/train")
    pixels = np.asarray(Image.open("p/train/red/03.png"))
    write(Path("p/train/red/03.png"), pixels + np.uint8(4))  # another photo
    Path("q/train/red").rename("q/train/rose")  # another class
    Path("few/train/red/03.png").unlink()
    for name in FILES:
        write(Path("only", name, name), b"somebody's")
    refused(capsys, flags.split(), text)

def test_main_resume_of_a_damaged_or_older_run_ends_in_one_line(finished, capsys):
    content = Path(finished, "checkpoint.pt").read_bytes()
    for damaged in (b"", content[:-99], b'{"dim": 2}', "names", "balance"):
        older = C.read_checkpoint(finished)
        (older["settings"] if damaged == "balance" else older).pop(damaged, None)
        write(Path("run/checkpoint.pt"), damaged if isinstance(damaged, bytes) else b"")
        if isinstance(damaged, str):
            torch.save(older, "run/checkpoint.pt")
        refused(capsys, ["--resume", "run"], "run/checkpoint.pt")
    with pytest.raises(C.UserError, match="^run/checkpoint.pt"):
        C.load_classifier("run")

def test_main_refuses_a_closed_place_before_it_annotates(words, monkeypatch, capsys):
    """Root may write everywhere, so the system's answers are made up."""
    forbid_clip(monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "run")
    refused(capsys, words, "run", "may be written")
    Path("file").write_bytes(b"")
    refused(capsys, [*words, "--output-dir", "file/run"], "file")

def test_main_refuses_a_name_that_the_terminal_lacks_before_it_reads(monkeypatch, capsys):
    grey("p/train/1.png", "p/train/2.png")
    monkeypatch.setattr(C, "open_image", lambda path: pytest.fail("an image was read"))
    argv = ["--dataset", "folder", "--data-dir", "p", "--classes", f"dog,{CAFE}"]
    with open("log", "w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        assert C.main(argv) == 2
    one_line(capsys, "'ascii' codec can't encode character", "xe9")
    assert not Path("runs").exists()

def test_main_resumes_a_finished_run_that_got_test_images(words, photos, monkeypatch):
    no_training(monkeypatch)
    for part, argv in (("train", words), ("test", ["--resume", "run"])):
        shutil.copytree(photos / part, f"p/{part}")
        assert C.main([*argv, "--data-dir", "p"]) == 0

def test_main_names_the_epoch_of_a_loss_that_is_not_finite(words, capsys):
    assert C.main([*words, "--epochs", "9", "--lr", "1e9"]) == 2
    [epoch] = re.findall(r"^coreg.py: epoch (\d).*--lr\n$", capsys.readouterr().err)
    assert len(metrics("run")) == int(epoch) - 1
    assert C.main(["--resume", "run", "--lr", "0.01", "--epochs", str(epoch)]) == 0

def test_main_names_predictions_that_are_not_finite(words, monkeypatch, capsys):
    no_training(monkeypatch)
    monkeypatch.setattr(C, "predict", lambda *args: torch.full((36, 3), math.inf))
    assert C.main([*words, "--synthetic", "0", "0"]) == 2
    one_line(capsys, "epoch 1", "finite")
    assert metrics("run") == []

def test_load_classifier_takes_every_mode_and_size(finished):
    names, classify = C.load_classifier(finished)
    assert names == ["blue", "green", "red"]
    square = two_colours().crop((16, 0, 48, 32))
    images = [square, two_colours(), Image.new("RGB", (1, 1)), Image.new("RGB", (300, 2))]
    images += [two_colours(mode) for mode in "1 L LA P RGBA CMYK HSV".split()]
    probs = classify(images)
    assert probs.dtype == torch.float32
    close(probs.sum(1), torch.ones(11))
    close(probs[1], probs[0])  # A photo counts as its centre square.

# (15) TinyCLIP -----------------------------------------------------------------------------
def test_TinyCLIP_gives_the_same_sets_on_every_machine():
    train, _, _, names = C.read_dataset(C.parse([]))
    clip = C.load_clip("tiny", "", "cpu")
    means, sets = C.annotate(clip, train, names, C.TEMPLATES["digits"], "cpu")
    assert zlib.crc32(np.packbits(sets.numpy())) == 778879908
    right = [k == label for k, (_, label) in zip(means.argmax(1).tolist(), train)]
    assert 0.5 < np.mean(right) <= 0.8  # One that is nearly always right would show nothing.

# The benchmark: python test_coreg.py --help ------------------------------------------------
def timed_functions(module, args, words):
    """What is timed of a coreg.py, on random images with a made-up split."""
    cfg = module.parse(words)
    images = make_pictures(max(args.images, 256), cfg.channels, cfg.image_size).to(cfg.device)
    candidates = (torch.arange(10) < 3).repeat(args.images, 1).to(cfg.device)
    data = module.WeakStrongImages(images[: args.images], candidates, cfg)
    both = [module.Learner(10, cfg, cfg.device) for _ in range(2)]
    is_clean = torch.arange(args.images) < args.clean
    both[1].split = (candidates / 3, is_clean.float().to(cfg.device))
    prototypes = torch.zeros(10, 128, device=cfg.device)
    epoch = cfg.warm_up + args.representation * (cfg.start_contrastive + 1)
    functions = {
        "co_train_epoch": partial(module.co_train_epoch, *both, prototypes, data, cfg, epoch),
        "split_data": partial(module.split_data, both[0], data, cfg),
        "warm_up_epoch": partial(module.warm_up_epoch, both[0], data, cfg)}
    for count in (1, 256):
        inputs = (images[:count], data.mean, data.std)
        functions[f"predict {count}, one network"] = partial(module.predict, both[:1], *inputs)
        functions[f"predict {count}, both"] = partial(module.predict, both, *inputs)
    return functions

def benchmark():
    """Times one network. Other flags: of coreg.py; else --dataset cifar10 --batch-size 128."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--clean", type=int, default=204, help="of the images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--representation", action="store_true", help="with Eq. 9 to 11")
    parser.add_argument("--old", help="another coreg.py, timed in turns with this one")
    args, words = parser.parse_known_args()
    if "--dataset" not in words:
        words = ["--dataset", "cifar10", "--batch-size", "128", *words]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    functions = timed_functions(C, args, words)
    if args.old:
        spec = importlib.util.spec_from_file_location("old", args.old)
        sys.modules["old"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["old"])
        functions["old"] = timed_functions(sys.modules["old"], args, words)["co_train_epoch"]
    times = {name: [] for name in functions}
    for _ in range(args.repeats + 1):  # in turns, for a busy machine; the first is a warm-up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    seconds = {name: np.median(values[1:]) for name, values in times.items()}
    result = {"clean images per second": args.clean / seconds["co_train_epoch"],
              "ratio to --old": args.old and seconds["co_train_epoch"] / seconds["old"]}
    print(json.dumps(vars(args) | result | {"seconds": seconds}, indent=1))

if __name__ == "__main__":
    benchmark()
