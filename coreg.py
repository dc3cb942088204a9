#!/usr/bin/env python3
"""Co-Reg in one readable file: a small image classifier from unlabeled images and a CLIP model.

Reference implementation of "Pre-Trained Vision-Language Models as Partial Annotators" (arXiv
2406.18550). CLIP annotates every image with many prompt templates; where they disagree the image
gets a *set* of candidate labels, and the set may be wrong. Two networks learn from these noisy
partial labels: each splits the data into clean and noisy for the other, and refines its labels.

    python coreg.py                       # handwritten digits, a tiny CLIP; no download, no label
    python coreg.py --dataset cifar10     # the paper's setting, with OpenAI's CLIP ViT-B/32

Table of contents: grep -n "^# (" coreg.py. Measured results and their commands: README.md.
"""
import argparse, copy, dataclasses, difflib, hashlib, json, math, os, sys, time, warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.datasets as tv
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

# Letters in shape comments: N images, K classes, T prompt templates, B batch, C channels, S image
# side, V views, D embedding, Q queue slots, E epochs, A anchors, M members of a contrast set.
# Suffixes: _w1 _w2 weak views, _s1 _s2 strong views, _x clean part of the split, _u unlabeled part.

class CoregError(Exception):
    """Something the user can mend: main() prints it as one line and returns `code`."""
    def __init__(self, message, code=2):
        super().__init__(" ".join(message.split()))
        self.code = code


# (1) Prompt templates and the table of datasets --------------------------------------------------
# A prompt is a template filled with a class name (paper, section 3.1). A dataset is a map-style
# torch dataset of (PIL image, label) pairs. Its row in DATASETS says how to read it, and which
# fields of Config differ from the paper's CIFAR-10 run.

def phrases(text):
    return [" ".join(phrase.split()) for phrase in text.split(";")]

TEMPLATES = {
    "small": phrases("""a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo of
        a {}; a photo of a clean {}; a photo of a dirty {}; a dark photo of the {}; a photo of my {};
        a photo of the cool {}; a close-up photo of a {}; a bright photo of the {}; a cropped photo
        of a {}; a photo of the {}; a good photo of the {}; a photo of one {}; a close-up photo of
        the {}; a rendition of the {}; a photo of the clean {}; a rendition of a {}; a photo of a
        nice {}; a good photo of a {}; a photo of the nice {}; a photo of the small {}; a photo of
        the weird {}; a photo of the large {}; a photo of a cool {}; a photo of a small {}"""),
    "digits": phrases("""a photo of the number {}.; a bold number {}.; a thin number {}.; a narrow
        number {}.; a wide number {}.; a slanted number {}.; a rotated number {}.; a wobbly number {}.;
        a blurry photo of the number {}.; a top-heavy number {}.; a bottom-heavy number {}.;
        a pixelated number {}."""),  # what TinyCLIP learns: each names a property of the drawing
    "imagenet": None}  # open_clip's own 80, fetched when used
DIGIT_NAMES = phrases("zero; one; two; three; four; five; six; seven; eight; nine")
TRAFFIC_SIGNS = phrases("""Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60; Speed limit
    70; Speed limit 80; End of speed limit 80; Speed limit 100; Speed limit 120; No passing; No
    passing for trucks; Right of way at the next intersection; Priority road; Yield; Stop; No
    vehicles; No trucks; No entry; General caution; Dangerous curve to the left; Dangerous curve to
    the right; Double curve; Bumpy road; Slippery road; Road narrows on the right; Road work; Traffic
    signals; Pedestrians; Children crossing; Bicycles crossing; Beware of ice and snow; Wild animals
    crossing; End of all limits; Turn right ahead; Turn left ahead; Ahead only; Go straight or right;
    Go straight or left; Keep right; Keep left; Roundabout; End of no passing; End of no passing for
    trucks""")

def digits(root, train):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels with grey values 0..16: no download."""
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)
    return list(zip(map(Image.fromarray, pixels), data.target.tolist()))

class Row(NamedTuple):
    read: callable            # read(root, train) -> pairs (PIL image, label)
    files: str                # what torchvision expects below --data-dir
    class_names: list = None  # for the prompts; None: the dataset's own
    holdout: bool = False     # read() knows no test part: keep a seeded fifth for the test
    preset: dict = {}         # fields of Config that differ from their defaults

def part(train):
    return "train" if train else "test"

LARGE = dict(image_size=64, epochs=100)
DATASETS = {
    "digits": Row(digits, "nothing: they come with scikit-learn", DIGIT_NAMES, True, dict(
        annotator="tiny", templates="digits", views="digit", image_size=16, channels=1, width=16,
        epochs=24, warm_up=8, start_contrastive=3, batch_size=64, lr=0.05, lr_period=24,
        proto_momentum=0.99, key_momentum=0.99, queue_size=1024)),
    "cifar10": Row(lambda root, train: tv.CIFAR10(root, train, download=True),
                   "cifar-10-batches-py/ or cifar-10-python.tar.gz"),
    "cifar100": Row(lambda root, train: tv.CIFAR100(root, train, download=True),
                    "cifar-100-python/ or cifar-100-python.tar.gz", preset=dict(warm_up=100)),
    "svhn": Row(lambda root, train: tv.SVHN(root, part(train), download=True),
                "train_32x32.mat and test_32x32.mat", [f"number {i}" for i in range(10)],
                preset=dict(views="sign")),
    "fmnist": Row(lambda root, train: tv.FashionMNIST(root, train, download=True),
                  "FashionMNIST/raw/*-ubyte.gz",
                  preset=dict(image_size=28, channels=1, epochs=100, views="grey")),
    "eurosat": Row(lambda root, train: tv.EuroSAT(root, download=True), "eurosat/2750/<class>/*.jpg",
                   holdout=True, preset=LARGE),
    "fer2013": Row(lambda root, train: tv.FER2013(root, "train"),  # cannot download: login needed
                   "fer2013/fer2013.csv, from kaggle.com, 'Challenges in Representation Learning: "
                   "Facial Expression Recognition Challenge'",
                   [f"{name} Facial Expression" for name in phrases(
                       "Angry; Disgust; Fear; Happy; Sad; Surprise; Neutral")],
                   True, dict(LARGE, channels=1, views="grey")),
    "gtsrb": Row(lambda root, train: tv.GTSRB(root, part(train), download=True),
                 "gtsrb/GTSRB/ and gtsrb/GT-final_test.csv",
                 ["German Traffic Sign: " + sign for sign in TRAFFIC_SIGNS],
                 preset=dict(LARGE, views="sign"))}
SPLIT_SEED = 0  # of every split and subset: another --seed sees the same images and annotations

def read_dataset(cfg):
    """cfg -> (train dataset, test dataset, class names), both datasets of (PIL image, label)."""
    row = DATASETS[cfg.dataset]
    try:
        train = row.read(cfg.data_dir, True)
        test = train if row.holdout else row.read(cfg.data_dir, False)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError) as error:
        raise CoregError(f"--dataset {cfg.dataset}: cannot read or download it below "
                         f"{cfg.data_dir!r} ({type(error).__name__}: {error}). Expected there: "
                         f"{row.files}. Put it there, or name its place with --data-dir") from error
    class_names = row.class_names or [name.replace("_", " ") for name in train.classes]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    if row.holdout:
        order, held_back = order[:round(0.8 * len(order))], order[round(0.8 * len(order)):]
        test = Subset(test, held_back)
    if not 2 <= (cfg.num_samples or len(order)) <= len(order):
        raise CoregError(f"--num-samples: expected 2 to {len(order)}, the training images of "
                         f"{cfg.dataset}, got {cfg.num_samples}")
    return Subset(train, order[:cfg.num_samples or None]), test, class_names

def to_square(image, size, channels):
    """PIL image -> uint8 [C,S,S]: shorter side to `size`, then the centre square."""
    image = TF.resize(image.convert("L" if channels == 1 else "RGB"), size)
    return TF.pil_to_tensor(TF.center_crop(image, size))

def collate(pairs, transform):
    images, labels = zip(*pairs)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)

def image_loader(dataset, transform, what, num_workers):
    """Batches (images [B,C,S,S], labels [B]) in the order of the dataset, with a progress bar."""
    workers = num_workers if len(dataset) > 4096 else 0  # few are read before processes have started
    loader = DataLoader(dataset, 256, num_workers=workers, collate_fn=partial(collate, transform=transform))
    return tqdm(loader, desc=what, disable=None, leave=False)


# (2) CLIP annotation -> candidate label sets -----------------------------------------------------
# Template t and class k give the text feature u_tk, image i the feature v_i. P[t,i,:] is the softmax
# over k of logit_scale * v_i . u_tk. The candidate set S_i is the union of what the single templates
# answer (paper, section 3.1): it is small where they agree, and may still miss the true label.

def candidate_sets(probs, mode="multi_prompt", top_k=5, ratio=0.5):
    """probs [T,N,K], rows sum to 1 -> candidate sets bool [N,K].

    multi_prompt: the argmax of every template. The other modes use the mean over templates:
    argmax: its largest; top_k: its `top_k` largest (at most K); ratio: those of the `top_k` largest
    that reach `ratio` (0..1) times the largest. Raises ValueError for any other mode.
    """
    sets = torch.zeros(probs.shape[1:], dtype=torch.bool, device=probs.device)
    if mode == "multi_prompt":
        return sets.scatter_(1, probs.argmax(2).T, True)
    if mode not in ("argmax", "top_k", "ratio"):
        raise ValueError(f"mode: expected multi_prompt, argmax, top_k or ratio, got {mode!r}")
    mean = probs.mean(0, dtype=torch.float32)  # [N,K]
    values, classes = mean.topk(1 if mode == "argmax" else min(top_k, mean.shape[1]))  # [N,k]
    return sets.scatter_(1, classes, values >= (ratio if mode == "ratio" else 0) * values[:, :1])

def flip_candidates(labels, num_classes, partial_rate, noise_rate, generator=None):
    """Synthetic sets bool [N,K] from true labels int [N], to study noise (paper, section 4).

    Each wrong label joins with probability `partial_rate`; then, with probability `noise_rate`,
    the true label is swapped for one from outside the set (a full set stays as it is).
    """
    n, true = len(labels), F.one_hot(labels, num_classes).bool()  # [N,K]
    sets = true | (torch.rand(n, num_classes, generator=generator) < partial_rate)
    # The largest of independent random numbers is a uniform draw among the labels outside the set.
    drawn = torch.rand(n, num_classes, generator=generator).masked_fill(sets, -1).argmax(1)
    swap = (torch.rand(n, generator=generator) < noise_rate) & ~sets.all(1)  # [N]
    return torch.where(swap[:, None], (sets & ~true) | F.one_hot(drawn, num_classes).bool(), sets)

def load_clip(cfg, device):
    """open_clip's model, its preprocessing of PIL images, and its tokenizer."""
    import open_clip  # here, so that `import coreg` stays light
    name, weights, known = cfg.clip_model, cfg.clip_pretrained, open_clip.list_models()
    if ":" not in name and name not in known:  # with a colon: hf-hub:... or local-dir:...
        raise CoregError(f"--clip-model: expected a model of open_clip, got {name!r}; near it: "
                         f"{', '.join(difflib.get_close_matches(name, known, 3)) or 'nothing'}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if ":" not in name and weights not in tags and not Path(weights).is_file():
        raise CoregError(f"--clip-pretrained: expected a file, or for {name} one of "
                         f"{', '.join(tags) or '(no tag)'}; got {weights!r}")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, weights, device=device)
    except Exception as error:  # open_clip and the hub raise many kinds; the advice is the same
        source = open_clip.get_pretrained_cfg(name, weights)
        fix = ("is it a checkpoint of this very model?" if Path(weights).is_file() else
               f"fetch the weights by hand (huggingface.co/{source.get('hf_hub', '')}"
               "open_clip_model.safetensors) and pass the file with --clip-pretrained FILE")
        raise CoregError(f"--clip-pretrained: cannot load {weights!r} into {name} "
                         f"({type(error).__name__}: {str(error)[:150]}); {fix}") from error
    return model.eval(), preprocess, open_clip.get_tokenizer(name)

@torch.inference_mode()
def annotate(model, tokenizer, batches, class_names, templates, device):
    """Class probabilities float16 [T,N,K] of every template, for batches of preprocessed images."""
    texts = torch.stack([model.encode_text(
        tokenizer([t.format(name) for name in class_names]).to(device), normalize=True)
        for t in templates])  # [T,K,D]
    probs = []
    for images, _ in batches:
        features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        logits = model.logit_scale.exp() * torch.einsum("bd,tkd->tbk", features, texts)
        probs.append(logits.float().softmax(2).half().cpu())
    return torch.cat(probs, 1)

# TinyCLIP, the annotator of the digits, is open_clip's CLIP class and tokenizer in a tiny size,
# trained on ANOTHER domain: glyphs of Pillow's two fonts under random geometry, with captions that
# truly describe the drawing. It has never seen a handwritten digit.

TINY_STEPS, TINY_BATCH, TINY_SEED = 800, 128, 0

def draw_glyphs(size=64, height=52):
    """The digits in Pillow's outline font (0-9) and in its bitmap font (10-19): [20,1,64,64]."""
    fonts = [ImageFont.load_default(size=64), ImageFont.load_default_imagefont()]
    glyphs = torch.zeros(20, 1, size, size)
    for i in range(20):
        image = Image.new("L", (96, 96))
        ImageDraw.Draw(image).text((8, 8), str(i % 10), fill=255, font=fonts[i // 10])
        image = image.crop(image.getbbox())
        image = image.resize((round(height * image.width / image.height), height), Image.BICUBIC)
        glyphs[i] = TF.center_crop(TF.pil_to_tensor(image), size) / 255
    return glyphs

def render_glyphs(glyphs, classes, side=32):
    """Classes [B] -> images [B,1,8,8] in [0,1], and which of the digit templates are true [B,T]."""
    n = len(classes)
    def uniform(low, high): return torch.rand(n) * (high - low) + low
    angle, shear, waist = uniform(-.25, .25), uniform(-.4, .4), uniform(-.3, .3)
    wide, tall, wobble = uniform(.8, 1.4), uniform(.95, 1.25), uniform(0, .2)
    font, stroke, blur = torch.randint(2, (n,)), torch.randint(3, (n,)), torch.rand(n) < .25
    cos, sin, column = angle.cos(), angle.sin(), (n, 1, 1, 1)
    theta = torch.stack([(cos + shear * sin) / wide, (shear * cos - sin) / wide, 0 * cos,
                         sin / tall, cos / tall, 0 * cos], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, side, side), align_corners=False)
    bend = F.interpolate(torch.randn(n, 2, 4, 4), size=side, mode="bicubic").permute(0, 2, 3, 1)
    grid = grid + wobble.view(column) * bend
    middle = torch.stack([uniform(-.15, .15), waist], 1).view(n, 1, 1, 2)
    grid = grid + middle * (1 - grid ** 2).clamp_min(0)  # moves the waist of an 8 up or down
    images = F.grid_sample(glyphs[classes + 10 * font], grid, align_corners=False)
    for i in (1, 2):  # thicken the stroke by one pixel, and by one more
        thick = F.max_pool2d(F.pad(images, (i - 1, 2 - i, i - 1, 2 - i)), 2, 1)
        images = torch.where((stroke >= i).view(column), thick, images)
    images = torch.where(blur.view(column), F.avg_pool2d(images, 5, 1, 2), images)
    ink = images[:, 0] > .4 * images.amax((2, 3)).unsqueeze(2)  # [B,32,32]
    place = torch.arange(float(side))  # cut at the bounding box of the ink, like the real digits
    def extent(hit): return (torch.where(hit, place, side).amin(1), torch.where(hit, place + 1, 0).amax(1))
    (top, bottom), (left, right) = extent(ink.any(2)), extent(ink.any(1))
    height = (bottom - top).clamp_min(4) / side
    width = torch.maximum((right - left) / side, height * uniform(1, 1.4))
    images = F.avg_pool2d(warp(images, width, 0, (left + right) / side - 1,
                               0, height, (top + bottom) / side - 1, "bilinear"), side // 8)
    plain = torch.full((n,), .35)  # the plain caption is always true; it is chosen less often
    true = torch.stack([plain, stroke == 2, stroke == 0, wide < .95, wide > 1.25, shear.abs() > .25,
                        angle.abs() > .17, wobble > .14, blur, waist < -.18, waist > .18, font == 1], 1)
    return images / images.amax((1, 2, 3), keepdim=True).clamp_min(.05), true

def tiny_preprocess(image):
    return TF.pil_to_tensor(TF.resize(image.convert("L"), [8, 8])) / 127.5 - 1  # [1,8,8] in -1..1

def load_tiny(folder, device):
    """TinyCLIP, its preprocessing and tokenizer; pre-trained at first use and kept in `folder`."""
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer
    torch.manual_seed(TINY_SEED)
    def layer(i, o, stride): return nn.Sequential(
        nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    model = CLIP(64, dict(image_size=8, patch_size=8, layers=1, width=8, head_width=8),
                 dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1))
    model.visual = nn.Sequential(  # in place of the transformer: convolutions suit 8x8 pixels
        layer(1, 24, 1), layer(24, 48, 2), layer(48, 48, 1), layer(48, 96, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 64))
    tokenizer, path = SimpleTokenizer(context_length=12), Path(folder) / "tiny-clip.pt"
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # not there yet, or not readable: train it (anew)
        print(f"TinyCLIP: pre-training on {TINY_STEPS * TINY_BATCH:,} rendered digits")
        pretrain_tiny(model, tokenizer([t.format(d) for t in TEMPLATES["digits"] for d in DIGIT_NAMES]))
        write_atomically(path, partial(torch.save, model.state_dict()))
    return model.eval().to(device), tiny_preprocess, tokenizer

def pretrain_tiny(model, tokens, lr=2e-3):
    """CLIP's symmetric contrastive loss on glyphs and true captions; tokens [T*10, length]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, TINY_STEPS, pct_start=.05)
    glyphs, pairs = draw_glyphs(), torch.arange(TINY_BATCH)
    for _ in tqdm(range(TINY_STEPS), desc="pre-train TinyCLIP", disable=None, leave=False):
        classes = torch.randint(10, (TINY_BATCH,))
        images, true = render_glyphs(glyphs, classes)
        captions = torch.multinomial(true, 1)[:, 0] * 10 + classes  # [B]
        features = model.encode_image(2 * images - 1, normalize=True)  # [B,D]
        texts = model.encode_text(tokens, normalize=True)[captions]  # [B,D]
        logits = model.logit_scale.exp() * features @ texts.T  # [B,B]
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

def write_atomically(path, write, code=2):
    """write(binary file) into a neighbour, then rename: `path` is never half-written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise CoregError(f"cannot write {path} ({error.strerror or error}): make room, or choose "
                         "another place with --output-dir or --data-dir", code) from error
    finally:
        if temporary.exists():
            temporary.unlink()

def cached_annotation(cfg, datasets, pixels, class_names, templates, device):
    """Probabilities float16 [T,N,K] of each dataset, from the cache or from the annotator.

    DIFFERS: the published cache knows only its folder, so an unseeded split could pair it with other
    images. Here its key holds the pixels (uint8 [N,C,S,S] of each), weights, prompts and templates.
    """
    weights, folder = cfg.clip_pretrained, Path(cfg.data_dir) / "annotations"
    if Path(weights).is_file():
        weights = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    tiny = ["tiny", TINY_STEPS, TINY_BATCH, TINY_SEED]
    key = json.dumps([cfg.dataset, SPLIT_SEED, class_names, templates,
                      tiny if cfg.annotator == "tiny" else [cfg.clip_model, weights],
                      [hashlib.sha256(p.numpy()).hexdigest() for p in pixels]])
    path = folder / f"{cfg.dataset}-{cfg.annotator}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    names = ["probs", "test_probs"][:len(datasets)]
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                print(f"annotation: read from {path}")
                return [torch.from_numpy(file[name]) for name in names]
    except FileNotFoundError:
        pass
    except Exception as error:  # a cut-off archive raises many kinds
        print(f"annotation: made anew, since {path} cannot be read ({error})")
    model, preprocess, tokenizer = (load_tiny(folder, device) if cfg.annotator == "tiny" else
                                    load_clip(cfg, device))
    probs = [annotate(model, tokenizer, image_loader(d, preprocess, "annotate", cfg.num_workers),
                      class_names, templates, device) for d in datasets]
    arrays = {name: p.numpy() for name, p in zip(names, probs)}
    write_atomically(path, lambda file: np.savez(file, key=np.array(key), **arrays))
    print(f"annotation: written to {path}")
    return probs


# (3) Weak and strong views -----------------------------------------------------------------------
# Images rest on the device as uint8. A view is made for a whole batch by tensor operations: weak =
# random crop and flip; strong = weak, one random operation per image, and a grey square (cutout).
# Random numbers are drawn on the CPU: the same seed gives the same views on every device.

def random_crop(images, padding, flip):
    """[B,C,S,S]: pad by `padding` black pixels, cut a random SxS window, mirror half if `flip`."""
    n, _, _, side = images.shape
    offset = torch.randint(2 * padding + 1, (2, n, 1))
    rows, columns = offset + torch.arange(side)  # [B,S] each
    columns = torch.where(torch.rand(n, 1) < (0.5 if flip else 0), columns.flip(1), columns)
    rows, columns = rows.to(images.device)[:, :, None], columns.to(images.device)[:, None]
    batch = torch.arange(n, device=images.device)[:, None, None]
    channels_last = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    return channels_last[batch, rows, columns].permute(0, 3, 1, 2)

def warp(images, a, b, c, d, e, f, mode="nearest"):
    """Affine map of [B,C,S,S]: output (x,y) in -1..1 shows input (ax+by+c, dx+ey+f); outside: 0.

    Each coefficient is a number or a tensor [B]: one call warps each image in its own way.
    """
    theta = torch.stack([torch.as_tensor(v, dtype=images.dtype, device=images.device).expand(len(images))
                         for v in (a, b, c, d, e, f)], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode=mode, align_corners=False)

def rotate(images, angle, scale=1.0, shift_x=0.0, shift_y=0.0, mode="nearest"):
    """Turn counter-clockwise by `angle` [B] in radians about the centre, scaled and shifted."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    return warp(images, cos, -sin, shift_x, sin, cos, shift_y, mode)

def blend(base, images, share):
    return torch.lerp(base, images, share.view(-1, 1, 1, 1))  # share [B]: one number per image

def posterize(images, bits):
    step = 2 ** (8 - bits.view(-1, 1, 1, 1))  # keep the upper `bits` [B] of each 8-bit value
    return (images * 255).round().div(step, rounding_mode="floor") * step / 255

# RandAugment: float images [B,C,S,S] in [0,1] and a strength u, uniform in [0,1), for each [B].
OPERATIONS = {
    "identity": lambda x, u: x,
    "autocontrast": lambda x, u: TF.autocontrast(x),
    "equalize": lambda x, u: TF.equalize(x),
    "brightness": lambda x, u: blend(torch.zeros_like(x), x, .05 + .9 * u),
    "color": lambda x, u: blend(TF.adjust_saturation(x, 0.), x, .05 + .9 * u),
    "contrast": lambda x, u: blend(TF.adjust_contrast(x, 0.), x, .05 + .9 * u),
    "sharpness": lambda x, u: blend(TF.adjust_sharpness(x, 0.), x, .05 + .9 * u),
    "posterize": lambda x, u: posterize(x, 4 + (5 * u).floor()),  # 4..8 bits
    "solarize": lambda x, u: torch.where(x < u.view(-1, 1, 1, 1) * 256 / 255, x, 1 - x),
    "rotate": lambda x, u: rotate(x, math.radians(30) * (2 * u - 1)),
    "shear_x": lambda x, u: warp(x, 1, .6 * u - .3, .6 * u - .3, 0, 1, 0),  # the top edge stays
    "shear_y": lambda x, u: warp(x, 1, 0, 0, .6 * u - .3, 1, .6 * u - .3),  # the left edge stays
    "translate_x": lambda x, u: warp(x, 1, 0, 1.2 * u - .6, 0, 1, 0),  # 0.6 in -1..1 is 0.3 sides
    "translate_y": lambda x, u: warp(x, 1, 0, 0, 0, 1, 1.2 * u - .6)}

def random_operation(images):
    """One operation with one strength per image [B,C,S,S]: each runs once, on its own images."""
    choice, strength = torch.randint(len(OPERATIONS), (len(images),)), torch.rand(len(images))
    order = choice.argsort()
    counts = choice.bincount(minlength=len(OPERATIONS)).tolist()  # on the CPU: nothing waits
    place, strength = order.to(images.device), strength[order].to(images.device)
    groups = zip(OPERATIONS.values(), images[place].split(counts), strength.split(counts))
    changed = torch.cat([operation(x, u) if len(x) else x for operation, x, u in groups])
    return torch.empty_like(images).index_copy_(0, place, changed.clamp(0, 1))

def random_affine(images):
    """For digits: turn by up to 20 degrees, scale by up to 15 %, shift by up to a tenth."""
    u = (2 * torch.rand(4, len(images)) - 1).to(images.device)
    return rotate(images, math.radians(20) * u[0], 1 + .15 * u[1], .2 * u[2], .2 * u[3], "bilinear")

def cutout(images, low, high):
    """A grey square at a random place of each image, its side uniform in low..high pixels."""
    n, side = len(images), images.shape[-1]
    half = (low + (high - low) * torch.rand(n, 1)) / 2
    hit = (torch.arange(side) + 0.5 - side * torch.rand(2, n, 1)).abs() < half  # [2,B,S]
    rows, columns = hit.to(images.device)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.5)

class Views:
    """uint8 batches [B,C,S,S] -> normalised float views, by the recipe of design `kind`.

    DIFFERS: mean and deviation of each channel are measured on the training images, not typed in.
    """
    def __init__(self, kind, images):
        side = images.shape[-1]
        self.padding = round(side / 16) if kind == "digit" else round(side / 8)
        self.flip = kind in ("photo", "grey")  # a mirrored digit or sign is another one
        self.change = {"digit": random_affine, "grey": lambda x: x}.get(kind, random_operation)
        self.square = {"digit": (0, side / 3), "grey": (16, 16)}.get(kind, (0, side / 2))
        some = images[::max(1, len(images) // 10_000)].float() / 255  # 10,000 images tell enough
        self.mean = some.mean((0, 2, 3)).view(1, -1, 1, 1)
        self.std = some.std((0, 2, 3)).clamp_min(1 / 255).view(1, -1, 1, 1)  # safe: a single colour

    def plain(self, images):
        return (images.float() / 255 - self.mean) / self.std

    def weak(self, images):
        return self.plain(random_crop(images, self.padding, self.flip))

    def strong(self, images):
        images = self.change(random_crop(images, self.padding, self.flip).float() / 255)
        return (cutout(images, *self.square) - self.mean) / self.std


# (4) Both networks -------------------------------------------------------------------------------
# Two pre-activation ResNet-18 (paper, section 4.1) that differ only in their random start. Each has a
# linear classifier and an MLP head whose unit-norm output z serves the representation losses, a
# momentum copy (MoCo's key encoder) and a queue of past keys (section 9).

class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, plus a shortcut that always starts after the first BN-ReLU."""
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x):
        a = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + self.shortcut(a)

class CoRegNet(nn.Module):
    """Images [B,C,S,S] -> (logits [B,K], unit-norm embeddings [B,D]), for any side S from 8.

    11,499,594 parameters for 10 classes, 32 pixels and width 64, as in the published code.
    """
    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128):
        super().__init__()
        strides = (2 if image_size >= 64 else 1, 2, 2, 2)  # large images are halved once more
        layers = [nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        dim = width
        for stage, stride in enumerate(strides):
            layers += [PreActBlock(dim, width * 2 ** stage, stride)]
            dim = width * 2 ** stage
            layers += [PreActBlock(dim, dim, 1)]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # [B, 8*width]
        self.fc = nn.Linear(dim, num_classes)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embedding_dim))

    def forward(self, images):
        features = self.encoder(images)
        return self.fc(features), F.normalize(self.head(features), dim=1)

class Learner:
    """One of the two networks, with all the state that belongs to it."""
    def __init__(self, net, cfg):
        self.net, self.key_net = net, copy.deepcopy(net).requires_grad_(False)
        self.queue = MomentumQueue(cfg.queue_size, cfg.embedding_dim).to(next(net.parameters()).device)
        self.losses = []  # of the last splits, [N] each: input of the mixture model (section 6)
        self.optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9, weight_decay=5e-4)  # paper 4.1

    def step(self, terms):
        """One optimizer step on the sum of the loss terms {name: scalar}; returns them, detached."""
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}


# (5) Warm-up -------------------------------------------------------------------------------------
# For the first epochs each network learns alone, on strong views, that its candidate set as a whole
# should have probability 1: L = partial cross-entropy + negative entropy (paper, section 3.2). The
# second term keeps predictions soft, so that wrong sets are not yet learnt by heart.

def partial_cross_entropy(logits, candidates):
    """Mean of -log(sum_{k in S_i} p_ik + 1e-5) over rows with |S_i| < K; 0 without such a row.

    logits [B,K] (gets the gradient), candidates bool [B,K] -> scalar.
    """
    partial_rows = ~candidates.all(1)  # [B]: a full set says nothing
    loss = -((logits.softmax(1) * candidates).sum(1) + 1e-5).log()  # 1e-5: published code
    return (loss * partial_rows).sum() / partial_rows.sum().clamp_min(1)

def negative_entropy(logits):
    """mean_i sum_k p_ik log p_ik, at most 0: the confidence penalty. logits [B,K] -> scalar."""
    log_probs = logits.log_softmax(1)
    return (log_probs.exp() * log_probs).sum(1).mean()

def cross_entropy(logits, targets):
    """Mean of -sum_k t_k log p_k for soft targets, both [B,K]; only the logits get a gradient."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()

def warm_up_epoch(own, images, candidates, soft_labels, views, batch_size):
    """Every image once, in batches of 2B. With soft labels [N,K]: plain distillation, no sets."""
    own.net.train()
    for rows in batches(torch.arange(len(images)), 2 * batch_size):
        rows = rows.to(images.device)
        logits, _ = own.net(views.strong(images[rows]))
        yield own.step({"set": cross_entropy(logits, soft_labels[rows])} if soft_labels is not None else
                       {"set": partial_cross_entropy(logits, candidates[rows]),
                        "entropy": negative_entropy(logits)})

def batches(rows, batch_size):
    """rows [n] in random batches; a last row left alone joins its neighbours: BatchNorm needs two."""
    parts = list(rows[torch.randperm(len(rows))].split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


# (6) GMM split -----------------------------------------------------------------------------------
# At the start of each later epoch every network judges all candidate sets: a set that holds the true
# label is learnt early, so its loss l_i = -log max_{k in S_i} p_ik is small. A mixture of two
# Gaussians over l gives w_i, the probability that set i is clean (paper, section 3.3).

def align_distribution(probs, mean_probs, prior):
    """normalise(p * prior / mean_probs): pulls the mean prediction towards the prior.

    probs [B,K], mean_probs [K] (mean prediction over the data), prior [K] -> [B,K].
    """
    aligned = probs * prior / mean_probs.clamp_min(1e-8)  # safe: a class nobody predicts
    return aligned / aligned.sum(1, keepdim=True).clamp_min(1e-12)

def max_candidate_loss(probs, candidates):
    """-log max_{k in S_i} p_ik [B], finite also where p underflows; probs, bool candidates [B,K]."""
    return -(probs * candidates).amax(1).clamp_min(torch.finfo(probs.dtype).tiny).log()

def clean_probability(loss_history, window=5, seed=0):
    """Raw losses [E,N], newest last -> probability [N] that a sample is of the low-loss group.

    Each epoch is scaled to 0..1, the last `window` are averaged, a two-component mixture is fitted.
    All zeros where none can be fitted (constant losses, one sample); an infinite loss is the worst.
    """
    losses = loss_history[-window:].float()
    worst = losses.masked_fill(~losses.isfinite(), -math.inf).amax(1, keepdim=True)
    losses = torch.where(losses.isfinite(), losses, worst)
    low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)
    mean = ((losses - low) / (high - low).clamp_min(1e-12)).mean(0)  # [N]
    if not mean.isfinite().all() or mean.max() == mean.min():
        return torch.zeros_like(mean)
    values = mean.cpu().numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten rounds without convergence are normal here
        posterior = mixture.fit(values).predict_proba(values)  # [N,2]
    return torch.from_numpy(posterior[:, mixture.means_.argmin()]).to(mean).nan_to_num(0)

class Split(NamedTuple):
    """What one network found out about all candidate sets, for the other one to use."""
    probs: torch.Tensor       # [N,K] aligned predictions
    clean_prob: torch.Tensor  # [N] w
    clean: torch.Tensor       # bool [N]

@torch.no_grad()
def split_data(learner, images, views, candidates, prior, batch_size, seed):
    """One pass over weak views in eval mode, then the mixture -> Split.

    DIFFERS: predictions are aligned with the mean of this very pass; the published code uses a
    table that is half of the last epoch's. And where less than a batch is clean (less than a tenth,
    if the data are few), the tenth with the lowest losses is; the published code crashes on none.
    """
    learner.net.eval()
    probs = torch.cat([learner.net(views.weak(batch))[0].softmax(1)
                       for batch in images.split(EVAL_BATCH)])  # [N,K]
    probs = align_distribution(probs, probs.mean(0), prior)
    losses = max_candidate_loss(probs, candidates)
    learner.losses = (learner.losses + [losses])[-5:]
    clean_prob = clean_probability(torch.stack(learner.losses), seed=seed)
    clean, tenth = clean_prob > 0.5, max(2, math.ceil(len(losses) / 10))
    if clean.sum() < min(batch_size, tenth):
        print(f"split: {int(clean.sum())} clean samples are too few; the {tenth} of lowest loss count")
        clean_prob = torch.zeros_like(losses)
        clean_prob[losses.topk(tenth, largest=False).indices] = 1
        clean = clean_prob > 0.5
    return Split(probs, clean_prob, clean)


# (7) Co-pseudo-labeling, with sharpening and mixup -----------------------------------------------
# A clean sample keeps its candidate set: its target is the partner's prediction within S_i, weighted
# w, plus the own prediction, weighted 1-w. An unlabeled sample takes the mean of both networks. The
# network then learns from mixtures of strong views (paper, section 3.3; MixMatch, DivideMix).

def sharpen(probs, temperature):
    """normalise(p^(1/temperature)), [B,K]: below 1 the largest probability grows."""
    powered = probs ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True).clamp_min(1e-12)

def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets [B,K] of clean samples: sharpen(w r + (1-w) o).

    own_probs [B,K]: o, the mean of the own softmax on both weak views. partner_probs [B,K] are
    restricted to the bool candidates [B,K] here, which gives r. clean_prob [B]: w.
    """
    inside = partner_probs * candidates
    inside = torch.where(inside.sum(1, keepdim=True) > 0, inside, candidates.to(inside))  # underflow
    restricted = inside / inside.sum(1, keepdim=True).clamp_min(torch.finfo(inside.dtype).tiny)
    w = clean_prob[:, None]
    return sharpen(w * restricted + (1 - w) * own_probs, temperature)

def guess_labels(probs, temperature):
    """Targets [B,K] of unlabeled samples: sharpened mean over views and networks, probs [V,B,K]."""
    return sharpen(probs.mean(0), temperature)

def mixup(inputs, targets, lam, permutation):
    """lam * row + (1 - lam) * permuted row, for inputs [B,...] and targets [B,K]; lam in 0.5..1."""
    return tuple(torch.lerp(t[permutation], t, lam) for t in (inputs, targets))

def ramp_up(epoch, warm_up, length=16):
    """0 at the end of the warm-up, 1 `length` epochs later (published: 16); epoch may be a fraction."""
    return min(max((epoch - warm_up) / length, 0.0), 1.0)

def squared_error(probs, targets):
    """Mean of (p - t)^2 over all entries of [B,K]; 0 for an empty batch."""
    return ((probs - targets) ** 2).sum() / max(1, probs.numel())

def self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u):
    """Cross-entropy on clean rows + weight_u * squared error on unlabeled rows, all [B,K] -> scalar.

    The logits get the gradient. Without unlabeled rows the second term is 0.
    """
    return cross_entropy(logits_x, targets_x) + weight_u * squared_error(logits_u.softmax(1), targets_u)


# (8) Prototype EMA alignment ---------------------------------------------------------------------
# A prototype c_k is the moving average of the embeddings of clean images of pseudo-class k; softmax
# over z . c / tau is a second classifier, pulled towards the same targets (paper, section 3.4).
# Both networks share one set, as published, although their heads are unrelated.

def update_prototypes(prototypes, embeddings, classes, momentum):
    """c_k <- m c_k + (1-m) z for one sample after the other, then unit rows; returns new [K,D].

    prototypes [K,D], embeddings [B,D], classes int [B]. In closed form, with n samples of class k:
    c_k <- m^n c_k + (1-m) sum_j m^(number of later samples of k) z_j. A zero row without hit stays.
    """
    hits = F.one_hot(classes, len(prototypes)).to(embeddings.dtype)  # [B,K]
    later = hits.flip(0).cumsum(0).flip(0) - hits  # [B,K]: samples of the class that follow
    weights = hits * (1 - momentum) * momentum ** later  # [B,K]
    return F.normalize(momentum ** hits.sum(0)[:, None] * prototypes + weights.T @ embeddings, dim=1)

def prototype_loss(similarity_x, targets_a_x, targets_b_x, similarity_u, targets_a_u, targets_b_u,
                   lam, temperature, weight_u=1.0):
    """lam KL(a || q) + (1-lam) KL(b || q) on clean rows + the same mixture of squared errors.

    q = softmax(similarity / temperature), similarity [B,K] = z . c gets the gradient; a, b [B,K] are
    the targets of the images that mixup joined. KL is a mean over rows, the error over entries.
    """
    log_q, q_u = (similarity_x / temperature).log_softmax(1), (similarity_u / temperature).softmax(1)
    kl = partial(F.kl_div, log_q, reduction="batchmean")
    return (lam * kl(targets_a_x) + (1 - lam) * kl(targets_b_x) + weight_u * (
        lam * squared_error(q_u, targets_a_u) + (1 - lam) * squared_error(q_u, targets_b_u)))


# (9) MoCo queue and the noisy supervised contrastive loss ----------------------------------------
# An anchor (query) is pulled to images of its pseudo-class, but only where both are clean, and always
# to its own key (the key encoder's view of the same image). Same class but not surely so: such a pair
# is neither positive nor negative (paper, section 3.4). Past keys wait in a queue.

class MomentumQueue(nn.Module):
    """Ring buffer of the last `size` keys [Q,D] with their classes [Q] and clean flags [Q].

    DIFFERS: the published queue starts with random keys, classes and real-valued flags; this one
    starts empty, and grows until `size` slots are filled.
    """
    def __init__(self, size, dim):
        super().__init__()
        self.size, self.pushed = size, 0
        self.register_buffer("keys", torch.zeros(0, dim))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))
        self.register_buffer("clean", torch.zeros(0, dtype=torch.bool))

    def push(self, keys, classes, clean):
        """keys [B,D], classes int [B], clean bool [B] take the next slots; the oldest go."""
        new_rows = dict(keys=keys[-self.size:], classes=classes[-self.size:], clean=clean[-self.size:])
        slots = (self.pushed + torch.arange(len(new_rows["keys"]), device=keys.device)) % self.size
        for name, new in new_rows.items():
            rows = torch.cat([getattr(self, name), new])[:self.size]
            setattr(self, name, rows.index_copy_(0, slots, new.detach()))
        self.pushed += len(slots)

def contrastive_masks(classes, clean, num_anchors):
    """classes int [M], clean bool [M] of [anchors, their keys, queue] -> (positives, ignored) [A,M].

    positives: same class and both clean, and the own key (at column i + A); the anchor itself is
    still marked, supcon_loss removes it. ignored: same class but not both clean, except the own key.
    """
    same = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean
    column = torch.arange(len(classes), device=classes.device)
    own_key = column[:num_anchors, None] + num_anchors == column
    return (same & both_clean) | own_key, same & ~both_clean & ~own_key

def supcon_loss(features, positives, ignored, temperature):
    """Mean over anchors of the mean over positives of -log softmax of the similarities -> scalar.

    features [M,D] unit rows, the first A are the anchors; all rows can get a gradient. positives,
    ignored bool [A,M]; with `ignored` all False this is SupCon. DIFFERS: ignored entries are set to
    -inf before a logsumexp; the published difference of two large sums can turn negative.
    """
    logits = features[:len(positives)] @ features.T / temperature  # [A,M]
    itself = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    log_norm = logits.masked_fill(ignored | itself, -math.inf).logsumexp(1, keepdim=True)
    positives = positives & ~itself
    total = (log_norm - logits).masked_fill(~positives, 0).sum(1)  # [A]
    return (total / positives.sum(1).clamp_min(1)).mean()

def co_training_terms(own, partner_net, prototypes, views_x, views_u, candidates, clean_prob,
                      partner_probs, lam, permutation, weight_u, representation, cfg):
    """One batch of co-training of network `own` -> ({name: loss term}, new prototypes).

    views_x, views_u: four views (w1, w2, s1, s2), [B,C,S,S] each; views_u may be empty. candidates
    bool [B,K], clean_prob [B], partner_probs [B,K]: of the clean rows. lam, permutation [2(B_x+B_u)]:
    mixup. representation: are the terms of sections 8 and 9 on? Everything is in published order.
    """
    (x_w1, x_w2, x_s1, x_s2), (u_w1, u_w2, u_s1, u_s2) = views_x, views_u
    num_x, num_u = len(x_w1), len(u_w1)
    with torch.no_grad():  # the own network labels in train mode, as published
        # DIFFERS: two weak views share one forward pass, hence their batch statistics.
        targets_u = partner_probs[:0]
        if num_u:
            u_w = torch.cat([u_w1, u_w2])
            probs_u = torch.cat([own.net(u_w)[0], partner_net(u_w)[0]]).softmax(1)
            targets_u = guess_labels(probs_u.view(4, num_u, -1), cfg.temperature)
        logits_w, embeddings_w = own.net(torch.cat([x_w1, x_w2]))
        own_probs = logits_w.softmax(1).view(2, num_x, -1).mean(0)
        targets_x = refine_labels(own_probs, partner_probs, candidates, clean_prob, cfg.temperature)
    targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
    inputs, mixed = mixup(torch.cat([x_s1, x_s2, u_s1, u_s2]), targets, lam, permutation)
    logits, embeddings = own.net(inputs)
    x, u = slice(2 * num_x), slice(2 * num_x, None)  # first rows count as clean, whatever was mixed in
    terms = {"labeled": cross_entropy(logits[x], mixed[x]),
             "unlabeled": weight_u * squared_error(logits[u].softmax(1), mixed[u])}
    if not representation:  # DIFFERS: the published code computes the rest, then drops it
        return terms, prototypes

    prototypes = update_prototypes(prototypes, embeddings_w[:num_x], targets_x.argmax(1),
                                   cfg.proto_momentum)
    similarity, other = embeddings @ prototypes.T, targets[permutation]
    terms["prototype"] = cfg.proto_weight * prototype_loss(
        similarity[x], targets[x], other[x], similarity[u], targets[u], other[u],
        lam, cfg.proto_temperature, cfg.lambda_u)

    _, queries = own.net(torch.cat([x_s1, u_s1]))
    with torch.no_grad():  # the key encoder follows the network as it is before this step
        get_ema_multi_avg_fn(cfg.key_momentum)(
            list(own.key_net.parameters()), list(own.net.parameters()), 0)
        _, keys = own.key_net(torch.cat([x_s2, u_s2]))
    classes = torch.cat([targets_x, targets_u]).argmax(1)  # [B]
    clean = torch.arange(len(classes), device=classes.device) < num_x
    positives, ignored = contrastive_masks(torch.cat([classes, classes, own.queue.classes]),
                                           torch.cat([clean, clean, own.queue.clean]), len(queries))
    features = torch.cat([queries, keys, own.queue.keys])  # [M,D]
    terms["contrastive"] = cfg.contrastive_weight * supcon_loss(
        features, positives, ignored, cfg.contrastive_temperature)
    own.queue.push(keys, classes, clean)
    return terms, prototypes


# (10) Evaluation ---------------------------------------------------------------------------------
# The prediction is the argmax of the sum of both networks' logits. The Evaluator alone holds true
# labels (None where there are none); training never sees it. Figures that need labels of training
# images, or a choice made on test labels, are diagnostics and marked with *.

EVAL_BATCH = 512

@torch.inference_mode()
def predict(net, images, views):
    """Logits [N,K] of one network in eval mode for uint8 images [N,C,S,S]."""
    net.eval()
    return torch.cat([net(views.plain(batch))[0] for batch in images.split(EVAL_BATCH)])

def accuracy(scores, labels):
    """Share of rows of scores [N,K] whose argmax is the label [N], in percent."""
    return 100 * (scores.argmax(1) == labels.to(scores.device)).float().mean().item()

class Evaluator(NamedTuple):
    train_labels: torch.Tensor  # [N] or None
    test_labels: torch.Tensor
    test_images: torch.Tensor   # uint8 [N,C,S,S], on the device

    def test(self, nets, views):
        """Test accuracy of both networks together and of each, in percent."""
        if self.test_labels is None:
            return {}
        logits = [predict(net, self.test_images, views) for net in nets]
        scores = dict(test_acc=sum(logits), test_acc_net1=logits[0], test_acc_net2=logits[1])
        return {name: accuracy(score, self.test_labels) for name, score in scores.items()}

    def coverage(self, candidates, chosen=slice(None)):
        """Share of the chosen candidate sets that hold the true label, in percent."""
        hit = candidates.cpu()[torch.arange(len(candidates)), self.train_labels]
        return 100 * hit[chosen].float().mean().item()

    def diagnose(self, splits, candidates):
        """How good a pair of splits is: precision of the clean part, accuracy of pseudo-labels."""
        if self.train_labels is None:
            return {}
        precision = [self.coverage(candidates, split.clean.cpu()) for split in splits]
        pseudo = accuracy(sum(split.probs for split in splits), self.train_labels)
        return {"clean_precision*": sum(precision) / 2, "pseudo_label_acc*": pseudo}

    def zero_shot(self, candidates, test_probs):
        """Lines (name, value) about the annotation; test_probs [T,N,K] or None."""
        lines = [("candidates, mean set size", candidates.sum(1).float().mean().item())]
        if self.train_labels is not None:
            lines.insert(0, ("candidates, coverage* %", self.coverage(candidates)))
        if self.test_labels is not None and test_probs is not None:
            best = max(accuracy(probs, self.test_labels) for probs in test_probs)
            mean = accuracy(test_probs.mean(0, dtype=torch.float32), self.test_labels)
            lines[:0] = [("zero-shot, best template* %", best), ("zero-shot, mean of templates %", mean)]
        return lines


# (11) The training loop, checkpoints and the command line ----------------------------------------
# After the warm-up, every epoch both networks split the data; network 1 then trains on the split of
# network 2, and network 2 on that of network 1 ("co-divide"). One log line, one JSON object an epoch.

def setting(default, help, low=None, high=math.inf, choices=None, stage=None):
    """A field of Config, and a flag: range low..high or choices; `stage` starts a group in --help."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, choices=choices, stage=stage))

@dataclasses.dataclass
class Config:
    """All settings. The defaults are the paper's CIFAR-10 run; DATASETS holds what other data change."""
    dataset: str = setting("digits", "data set", choices=list(DATASETS), stage="data")
    data_dir: str = setting("data", "folder of data sets and cached annotations")
    num_samples: int = setting(0, "train on a random subset of so many images; 0: on all", 0)
    num_workers: int = setting(min(8, os.cpu_count() or 1), "processes that decode images", 0)
    image_size: int = setting(32, "side of the network's input in pixels", 8)
    channels: int = setting(3, "1: grey, 3: RGB", choices=[1, 3])
    views: str = setting("photo", "kind of random views; sign and digit: no mirror; grey: no RandAugment",
                         choices=["photo", "sign", "grey", "digit"])
    annotator: str = setting("clip", "source of candidate sets; flip: noise added to true labels, for study",
                             choices=["clip", "tiny", "flip"], stage="annotation")
    clip_model: str = setting("ViT-B-32-quickgelu", "any model of open_clip")
    clip_pretrained: str = setting("openai", "open_clip's tag of its weights, or a local file")
    templates: str = setting("small", "small: 27, imagenet: 80, digits: 12", choices=list(TEMPLATES))
    num_templates: int = setting(0, "use only the first so many templates; 0: all", 0)
    candidates: str = setting("multi_prompt", "rule for the sets; soft: no sets, plain distillation",
                              choices=["multi_prompt", "argmax", "top_k", "ratio", "soft"])
    top_k: int = setting(5, "labels in a set, for top_k and ratio", 1)
    ratio: float = setting(0.5, "for ratio: least probability, as a share of the largest", 0, 1)
    partial_rate: float = setting(0.1, "for flip: chance q of each wrong label to join", 0, 1)
    noise_rate: float = setting(0.1, "for flip: chance eta that the true label is missing", 0, 1)
    epochs: int = setting(800, "epochs in all", 1, stage="training")
    warm_up: int = setting(50, "epochs of warm-up", 0)
    start_contrastive: int = setting(10, "epochs from there to the representation terms", 0)
    batch_size: int = setting(256, "clean images in a batch", 2)
    lr: float = setting(0.01, "learning rate of SGD", 1e-12)
    lr_period: int = setting(800, "epochs from lr to lr/1000; the paper's 100-epoch runs keep 800", 1)
    width: int = setting(64, "channels of the first stage of the ResNet-18", 1)
    embedding_dim: int = setting(128, "size D of the embeddings", 1)
    prior: str = setting("uniform", "class shares to align with; clip: its mean prediction",
                         choices=["uniform", "clip"], stage="method")
    temperature: float = setting(0.5, "sharpening temperature T", 1e-3)
    mixup_alpha: float = setting(4.0, "mixup: lambda ~ Beta(alpha, alpha)", 1e-3)
    lambda_u: float = setting(1.0, "weight of the squared error on unlabeled images", 0)
    proto_weight: float = setting(0.1, "weight of prototype alignment", 0)
    proto_momentum: float = setting(0.999, "momentum of the prototypes", 0, 1)
    proto_temperature: float = setting(0.3, "temperature tau of prototype similarities", 1e-3)
    contrastive_weight: float = setting(0.1, "weight of the contrastive loss", 0)
    contrastive_temperature: float = setting(0.07, "temperature of the contrastive loss", 1e-3)
    key_momentum: float = setting(0.999, "momentum of the key encoders (MoCo)", 0, 1)
    queue_size: int = setting(8192, "keys Q in each queue", 1)
    seed: int = setting(0, "of networks, order and views", 0, 2 ** 32 - 1, stage="run")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    output_dir: str = setting("", "folder of the run (empty: runs/<dataset>, then -2, -3, ...)")
    overwrite: bool = setting(False, "replace the run that --output-dir holds")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if low is not None and not (math.isfinite(value) and low <= value <= high):
                bounds = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                raise CoregError(f"--{field.name.replace('_', '-')}: expected {bounds}, got {value}")
        tiny, flip = self.annotator == "tiny", self.annotator == "flip"
        for wrong, message in [
                (self.warm_up >= self.epochs, f"--warm-up: expected less than --epochs {self.epochs}, "
                                              f"got {self.warm_up}; set both"),
                (tiny and self.templates != "digits", "--annotator tiny: knows --templates digits only"),
                (tiny and self.dataset != "digits", "--annotator tiny: knows --dataset digits only"),
                (flip and self.candidates == "soft", "--candidates soft: --annotator flip has no soft labels"),
                (flip and self.prior == "clip", "--prior clip: --annotator flip has no predictions")]:
            if wrong:
                raise CoregError(message)

def parse(argv):
    """Command line -> Config; its defaults are those of the data set that the line names."""
    def fail(message): raise CoregError(f"{message}. See: python coreg.py --help")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=Config.dataset)
    parser = argparse.ArgumentParser(
        "coreg.py", description="Co-Reg: unlabeled images + CLIP -> a small classifier. The defaults "
        "below are those of the data set named on the same line.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    first.error = parser.error = fail
    row = DATASETS.get(first.parse_known_args(argv)[0].dataset)
    for field in dataclasses.fields(Config):
        if field.metadata["stage"]:
            group = parser.add_argument_group(field.metadata["stage"])
        kind = dict(action="store_true") if field.type is bool else dict(
            type=field.type, choices=field.metadata["choices"], metavar=field.type.__name__.upper())
        text = field.metadata["help"] + (": %(choices)s" if field.metadata["choices"] else "")
        group.add_argument("--" + field.name.replace("_", "-"), help=text, **kind,
                           default=(row.preset if row else {}).get(field.name, field.default))
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word, parser._option_string_actions, 1)
        fail(f"unknown argument {word!r}" + (f", did you mean {near[0]}?" if near else ""))
    return Config(**vars(known))

def pick_device(name):
    """--device -> torch.device; auto: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CoregError(f"--device: expected auto, cpu, cuda, cuda:N or mps that this machine has, "
                         f"got {name!r} ({str(error).splitlines()[0][:90]}); try --device cpu") from error
    return device

def choose_run_folder(cfg):
    """A folder that holds no run; nothing is created yet."""
    def holds_run(path): return (path / "config.json").exists() or (path / "metrics.jsonl").exists()
    if cfg.output_dir:
        if holds_run(Path(cfg.output_dir)) and not cfg.overwrite:
            raise CoregError(f"--output-dir: {cfg.output_dir} holds a run already; choose another "
                             "folder, or replace the run with --overwrite")
        return Path(cfg.output_dir)
    base = Path("runs") / cfg.dataset
    numbered = (base.with_name(f"{cfg.dataset}-{i}") for i in range(2, 10 ** 6))
    return next(p for p in [base, *[]] + [] if not holds_run(p)) if not holds_run(base) else next(
        p for p in numbered if not holds_run(p))

def cosine_lr(epoch, lr, period):
    """Half cosine from lr (epoch 0) to lr/1000 (epoch `period`), and lr/1000 after it."""
    low = lr / 1000
    return low + (lr - low) * (1 + math.cos(math.pi * min(epoch, period) / period)) / 2

def co_training_epoch(own, partner, split, prototypes, images, candidates, views, cfg, epoch):
    """Every clean sample of the partner's split once -> generator of loss terms; prototypes in place.

    Unlabeled batches run beside the clean ones and start again when they are used up.
    """
    # Published: at every epoch the key encoder starts as a copy of its network. DIFFERS: its
    # BatchNorm statistics too.
    own.key_net.load_state_dict(own.net.state_dict())
    own.net.train(), own.key_net.train(), partner.net.eval()
    clean, unlabeled = split.clean.nonzero()[:, 0].cpu(), (~split.clean).nonzero()[:, 0].cpu()
    batches_x, batches_u = batches(clean, cfg.batch_size), []
    for step, rows_x in enumerate(batches_x):
        batches_u = batches_u or batches(unlabeled, cfg.batch_size)
        rows_u = batches_u.pop()
        rows_x, rows_u = rows_x.to(images.device), rows_u.to(images.device)
        four_x, four_u = ([view(images[rows]) for view in (views.weak, views.weak, views.strong,
                           views.strong)] for rows in (rows_x, rows_u))
        lam = np.random.beta(cfg.mixup_alpha, cfg.mixup_alpha)
        now = epoch + step / len(batches_x)
        terms, updated = co_training_terms(
            own, partner.net, prototypes, four_x, four_u, candidates[rows_x],
            split.clean_prob[rows_x], split.probs[rows_x], max(lam, 1 - lam),
            torch.randperm(2 * (len(rows_x) + len(rows_u))).to(images.device),
            cfg.lambda_u * ramp_up(now, cfg.warm_up),
            epoch > cfg.warm_up + cfg.start_contrastive, cfg)  # ">" as published: one epoch later
        prototypes.copy_(updated)
        yield own.step(terms)

TERMS = ("set", "entropy", "labeled", "unlabeled", "prototype", "contrastive")

def mean_terms(steps, count, epoch):
    """Means of the loss terms over the steps of an epoch; the one moment that waits for the device."""
    steps = list(tqdm(steps, total=count, desc=f"epoch {epoch + 1}", disable=None, leave=False))
    table = torch.stack([torch.stack(list(terms.values())) for terms in steps]).cpu()  # [steps, terms]
    for step, column in (~table.isfinite()).nonzero().tolist()[:1]:
        raise CoregError(f"training stopped: the loss term '{list(steps[0])[column]}' is not finite at "
                         f"epoch {epoch + 1}, step {step + 1}; try a smaller --lr", code=1)
    return dict(zip(steps[0], table.mean(0).tolist()))

def train(cfg, images, candidates, soft_labels, prior, evaluator, folder):
    """Trains both networks -> (learners, views, records), one record per epoch in metrics.jsonl.

    images uint8 [N,C,S,S], candidates bool [N,K], soft_labels [N,K] or None, prior [K].
    """
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed)
    views, num_classes = Views(cfg.views, images), candidates.shape[1]
    learners = [Learner(CoRegNet(num_classes, cfg.channels, cfg.image_size, cfg.width,
                                 cfg.embedding_dim).to(images.device), cfg) for _ in range(2)]
    prototypes = torch.zeros(num_classes, cfg.embedding_dim, device=images.device)
    records = []
    print("  epoch  phase       lr     loss = " + " + ".join(f"{t[:7]:>7}" for t in TERMS)
          + "  clean  acc1%  acc2%  both%  seconds")
    for epoch in range(cfg.epochs):
        start, diagnosis, clean = time.time(), {}, [None, None]
        lr = cosine_lr(epoch, cfg.lr, cfg.lr_period)
        for learner in learners:
            learner.optimizer.param_groups[0]["lr"] = lr
        if epoch < cfg.warm_up or soft_labels is not None:
            phase = "warm-up" if soft_labels is None else "distill"
            both = [mean_terms(warm_up_epoch(own, images, candidates, soft_labels, views, cfg.batch_size),
                               math.ceil(len(images) / 2 / cfg.batch_size), epoch) for own in learners]
        else:
            phase = "co-train"
            splits = [split_data(learner, images, views, candidates, prior, cfg.batch_size, cfg.seed)
                      for learner in learners]
            clean = [int(split.clean.sum()) for split in splits]
            diagnosis = evaluator.diagnose(splits, candidates)
            both = [mean_terms(co_training_epoch(learners[i], learners[1 - i], splits[1 - i], prototypes,
                                                 images, candidates, views, cfg, epoch),
                               math.ceil(clean[1 - i] / cfg.batch_size), epoch) for i in (0, 1)]
        terms = {t: sum(b.get(t, 0.0) for b in both) / 2 for t in TERMS}
        record = dict(epoch=epoch + 1, phase=phase, lr=lr, loss=sum(terms.values()), **terms,
                      clean_net1=clean[0], clean_net2=clean[1], **diagnosis,
                      **evaluator.test([own.net for own in learners], views),
                      seconds=round(time.time() - start, 2))
        records.append(record)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        acc = "  ".join(f"{record.get(a, math.nan):5.2f}" for a in ("test_acc_net1", "test_acc_net2", "test_acc"))
        print(f"{epoch + 1:4}/{cfg.epochs:<3} {phase:8} {lr:.5f} {record['loss']:7.4f} = "
              + " + ".join(f"{v:7.4f}" for v in terms.values())
              + f" {sum(c or 0 for c in clean) // 2:6}  {acc}  {record['seconds']:7.1f}", flush=True)
    return learners, views, records

def run(cfg):
    """Data -> annotation -> training -> files of the run and a table."""
    device, folder = pick_device(cfg.device), choose_run_folder(cfg)
    train_set, test_set, class_names = read_dataset(cfg)
    to_tensor = partial(to_square, size=cfg.image_size, channels=cfg.channels)
    parts = [list(zip(*image_loader(data, to_tensor, "read", cfg.num_workers))) for data in (train_set, test_set)]
    (images, train_labels), (test_images, test_labels) = [map(torch.cat, part) for part in parts]
    write_atomically(folder / "config.json", lambda file: file.write(
        json.dumps(dataclasses.asdict(cfg), indent=1).encode()))
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    print(f"{cfg.dataset}: {len(images)} training and {len(test_images)} test images, {len(class_names)} "
          f"classes, on {device}; results go to {folder}")
    evaluator = Evaluator(train_labels, test_labels, test_images.to(device))
    soft_labels = test_probs = None
    prior = torch.full((len(class_names),), 1 / len(class_names))
    if cfg.annotator == "flip":
        print("annotation: synthetic sets, made from the TRUE labels (a study of noise, not a result)")
        candidates = flip_candidates(train_labels, len(class_names), cfg.partial_rate, cfg.noise_rate,
                                     torch.Generator().manual_seed(cfg.seed))
    else:
        templates = TEMPLATES[cfg.templates]
        if cfg.templates == "imagenet":
            import open_clip
            templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        if cfg.num_templates > len(templates):
            raise CoregError(f"--num-templates: expected at most {len(templates)}, got {cfg.num_templates}")
        probs, test_probs = cached_annotation(
            cfg, [train_set, test_set], [images, test_images], class_names,
            templates[:cfg.num_templates or None], device)
        soft = probs.mean(0, dtype=torch.float32)  # [N,K]
        candidates = candidate_sets(probs, "multi_prompt" if cfg.candidates == "soft" else cfg.candidates,
                                    cfg.top_k, cfg.ratio)
        prior = soft.mean(0) if cfg.prior == "clip" else prior
        soft_labels = soft.to(device) if cfg.candidates == "soft" else None
    lines = evaluator.zero_shot(candidates, test_probs)
    learners, views, records = train(cfg, images.to(device), candidates.to(device), soft_labels,
                                     prior.to(device), evaluator, folder)
    write_atomically(folder / "model.pt", partial(torch.save, dict(
        networks=[{k: v.cpu() for k, v in own.net.state_dict().items()} for own in learners],
        class_names=class_names, mean=views.mean.cpu(), std=views.std.cpu(), image_size=cfg.image_size,
        in_channels=cfg.channels, width=cfg.width, embedding_dim=cfg.embedding_dim)), code=1)
    if cfg.warm_up and "test_acc" in records[-1]:
        lines.append(("test accuracy after warm-up, both %", records[cfg.warm_up - 1]["test_acc"]))
    for name, key in (("network 1", "test_acc_net1"), ("network 2", "test_acc_net2"), ("both", "test_acc")):
        if key in records[-1]:
            lines.append((f"final test accuracy, {name} %", records[-1][key]))
    print("\n" + "\n".join(f"{name:36} {value:6.2f}" for name, value in lines))
    print(f"(* needs labels that training never sees)  {folder / 'model.pt'}")

def main(argv=None):
    """Runs the command line; returns the exit code: 0, 1 (training failed), 2 (bad input), 130."""
    try:
        run(parse(argv))
    except CoregError as error:
        print(f"coreg.py: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("coreg.py: interrupted", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
