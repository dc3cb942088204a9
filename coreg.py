#!/usr/bin/env python3
"""Co-Reg: a small image classifier from unlabeled images and a vision-language model.

Reference implementation, in one readable file, of "Pre-Trained Vision-Language Models as Partial
Annotators" (arXiv 2406.18550). CLIP annotates every image with many prompt templates; where they
disagree the image gets a *set* of candidate labels, and the set may be wrong. Two networks learn
from these noisy partial labels: each sorts the sets for the other and refines its labels.

    python coreg.py                       # handwritten digits, a tiny CLIP; no download, no label
    python coreg.py --dataset cifar10     # the paper's setting, with OpenAI's CLIP ViT-B/32

Contents: grep -n "^# (" coreg.py. Measured results, each with its command: README.md.
"""
import argparse, contextlib, copy, csv, dataclasses, difflib, hashlib, io, json, logging, math, os
import signal, sys, time, warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.datasets as tv
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

# Letters in shape comments: N images, K classes, T prompt templates, B batch, C channels, S image
# side, V views, D embedding, Q queue slots, E epochs, A anchors, M members of a contrast set.
# Suffixes: _w1 _w2 weak views, _s1 _s2 strong views, _x clean part of the split, _u unlabeled part.

class CoregError(Exception):
    """CoregError(message, exit code=2): what the user can mend; main() prints it as one line."""

def expect(condition, name, expected, got):
    if not condition:
        raise CoregError(f"{name}: expected {expected}, got {got}")

@contextlib.contextmanager
def advice(message):
    """Whatever goes wrong inside becomes this one line: libraries raise many kinds of errors."""
    try:
        yield
    except CoregError:
        raise
    except Exception as error:
        raise CoregError(f"{message} ({type(error).__name__}: {str(error)[:150]})") from error

# (1) Prompt templates and the table of datasets --------------------------------------------------
# A prompt is a template filled with a class name. A data set is a sequence of pairs (PIL image,
# label); its row in DATASETS says how to read it, and which settings differ from those of CIFAR-10.

def phrases(text):
    return [" ".join(phrase.split()) for phrase in text.split(";")]

TEMPLATES = {
    "small": phrases("""a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo
        of a {}; a photo of a clean {}; a photo of a dirty {}; a dark photo of the {}; a photo of my
        {}; a photo of the cool {}; a close-up photo of a {}; a bright photo of the {}; a cropped
        photo of a {}; a photo of the {}; a good photo of the {}; a photo of one {}; a close-up
        photo of the {}; a rendition of the {}; a photo of the clean {}; a rendition of a {}; a
        photo of a nice {}; a good photo of a {}; a photo of the nice {}; a photo of the small {};
        a photo of the weird {}; a photo of the large {}; a photo of a cool {}; a photo of a small
        {}"""),
    "digits": phrases("""a photo of the number {}.; a bold number {}.; a thin number {}.; a narrow
        number {}.; a wide number {}.; a slanted number {}.; a rotated number {}.; a wobbly number
        {}.; a blurry photo of the number {}.; a top-heavy number {}.; a bottom-heavy number {}.; a
        pixelated number {}."""),  # all that TinyCLIP knows: each names a trait of the drawing
    "imagenet": []}  # open_clip's own 80, taken from there when used
DIGITS = phrases("zero; one; two; three; four; five; six; seven; eight; nine")
SIGNS = phrases("""Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60; Speed limit 70;
    Speed limit 80; End of speed limit 80; Speed limit 100; Speed limit 120; No passing; No passing
    for trucks; Right of way at the next intersection; Priority road; Yield; Stop; No vehicles; No
    trucks; No entry; General caution; Dangerous curve to the left; Dangerous curve to the right;
    Double curve; Bumpy road; Slippery road; Road narrows on the right; Road work; Traffic signals;
    Pedestrians; Children crossing; Bicycles crossing; Beware of ice and snow; Wild animals
    crossing; End of all limits; Turn right ahead; Turn left ahead; Ahead only; Go straight or
    right; Go straight or left; Keep right; Keep left; Roundabout; End of no passing; End of no
    passing for trucks""")

def read_digits(cfg, split):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels with grey values 0..16: no download."""
    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    return list(zip(map(Image.fromarray, images), data.target.tolist()))

def open_image(path):
    """A file in any mode -> PIL image, RGB, upright; 16 bits become 8, transparent is white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

class Files:
    """Image files as a sequence of pairs (PIL image, label or None)."""
    def __init__(self, paths, labels=None, classes=()):
        self.paths, self.labels, self.classes = paths, labels or [None] * len(paths), classes
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return open_image(self.paths[i]), self.labels[i]

def find_images(folder):
    kinds = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
    return sorted(path for path in Path(folder).rglob("*")
                  if path.suffix.lower() in kinds and path.is_file())

def read_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]

def read_folder(cfg, split):
    """The user's images. train: all below <data-dir>/train/, or below <data-dir> without that;
    test: <data-dir>/test/<class>/. Folders of train/ are labels for `flip`, `supervised` only."""
    root, train, test = (Path(cfg.data_dir) / name for name in ("", "train", "test"))
    folder = test if split == "test" else train if train.is_dir() else root
    paths = [path for path in find_images(folder)
             if (path.parent != test if split == "test" else test not in path.parents)]
    names = read_lines(Path(cfg.classes)) or cfg.classes.split(",") if cfg.classes else (
        sorted(path.name for path in train.glob("*") if path.is_dir()))
    classes = [name.strip().replace("_", " ") for name in names]
    expect(len(set(classes)) == len(classes) > 1 and all(classes), "--classes", "two or more "
           "names, as \"cat,dog\", a file with one per line, or folders train/<class>/", classes)
    if split == "train" and not cfg.needs_labels:
        return Files(paths, None, classes)
    labels = [path.relative_to(folder).parts[0].replace("_", " ") for path in paths]
    others = sorted(set(labels) - set(classes))
    expect(not others, f"folders in {folder}", f"names out of {classes}", others)
    return Files(paths, [classes.index(label) for label in labels], classes)

class Row(NamedTuple):
    read: callable            # read(cfg, "train" or "test") -> pairs (PIL image, label)
    files: str                # what is expected below --data-dir
    class_names: list = None  # as the prompts say them; None: the dataset's own
    holdout: bool = False     # a seeded fifth of the training part is the test part
    preset: dict = {}         # fields of Config that differ from their defaults

def standard(reader):
    """A torchvision class with train=True or False -> read(cfg, split)."""
    return lambda cfg, split: reader(cfg.data_dir, split == "train", download=True)

GREY = dict(channels=1, epochs=100, views="grey")
DATASETS = {
    "digits": Row(read_digits, "nothing, it comes with scikit-learn", DIGITS, True, dict(
        annotator="tiny", templates="digits", views="digit", image_size=8, channels=1, width=16,
        epochs=18, warm_up=4, batch_size=64, lr=0.05, lr_period=18, momentum=0.99,
        queue_size=1024, precision="fp32")),  # so small a network is faster without bf16
    "folder": Row(read_folder, "images (JPEG, PNG, WebP, BMP); or train/ and test/<class>/",
                  preset=dict(epochs=100)),
    "cifar10": Row(standard(tv.CIFAR10), "cifar-10-batches-py/"),
    "cifar100": Row(standard(tv.CIFAR100), "cifar-100-python/", preset=dict(warm_up=100)),
    "svhn": Row(lambda cfg, split: tv.SVHN(cfg.data_dir, split, download=True), "*_32x32.mat",
                [f"number {i}" for i in range(10)], preset=dict(views="sign")),
    "fmnist": Row(standard(tv.FashionMNIST), "FashionMNIST/raw/", preset=dict(GREY, image_size=28)),
    "eurosat": Row(lambda cfg, split: tv.EuroSAT(cfg.data_dir, download=True), "eurosat/2750/",
                   holdout=True, preset=dict(image_size=64, epochs=100)),
    "fer2013": Row(lambda cfg, split: tv.FER2013(cfg.data_dir), "fer2013/fer2013.csv, from "
                   "kaggle.com's Challenges in Representation Learning: only you can download it",
                   [f"{face} Facial Expression" for face in phrases("Angry; Disgust; Fear; Happy; "
                    "Sad; Surprise; Neutral")], True, dict(GREY, image_size=64)),
    "gtsrb": Row(lambda cfg, split: tv.GTSRB(cfg.data_dir, split, download=True), "gtsrb/GTSRB/",
                 [f"German Traffic Sign: {sign}" for sign in SIGNS],
                 preset=dict(image_size=64, epochs=100, views="sign"))}
SPLIT_SEED = 0  # of every split and subset: all --seed see the same images and annotations

def read_dataset(cfg):
    """cfg -> (training pairs, test pairs, class names); pairs of (PIL image, label or None)."""
    row = DATASETS[cfg.dataset]
    with advice(f"--data-dir: {cfg.dataset} can be neither read nor downloaded; expected below "
                f"{cfg.data_dir!r}: {row.files}"):
        train = row.read(cfg, "train")
        test = train if row.holdout else row.read(cfg, "test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    cut = round(0.8 * len(order)) if row.holdout else len(order)
    expect(cut > 1, f"--data-dir {cfg.data_dir}", row.files, f"{cut} images")
    expect(1 < (cfg.num_samples or cut) <= cut, "--num-samples", f"2 to {cut}", cfg.num_samples)
    class_names = row.class_names or [name.replace("_", " ") for name in train.classes]
    return (Subset(train, sorted(order[:cfg.num_samples or cut])),
            Subset(test, sorted(order[cut:]) if row.holdout else range(len(test))), class_names)

def to_square(image, size, channels):
    """PIL image -> uint8 [C,S,S]: shorter side to `size`, then the centre square."""
    image = TF.resize(image.convert("L" if channels == 1 else "RGB"), size)
    return TF.pil_to_tensor(TF.center_crop(image, size))

def decode(pairs, transform, rows):
    """Rows of pairs -> (images [B,...], labels [B], -1 where unknown, rows); unreadable ones go."""
    images, labels, kept = [], [], []
    for row in rows:
        with contextlib.suppress(Exception):  # a broken file raises nearly any kind
            image, label = pairs[row]
            images.append(transform(image))
            labels.append(-1 if label is None else label)
            kept.append(row)
    return torch.stack(images) if images else torch.empty(0), labels, kept

def load_batches(pairs, transform, task, num_workers):
    """decode() over all pairs in order, in background processes where they are many."""
    workers = num_workers if len(pairs) > 4096 else 0  # few images are faster without
    return tqdm(DataLoader(range(len(pairs)), 256, num_workers=workers, collate_fn=partial(
        decode, pairs, transform)), desc=task, disable=None, leave=False)

def write_atomically(path, content):
    """Write bytes into a neighbour, then rename: `path` is never half-written."""
    path, neighbour = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        neighbour.write_bytes(content)
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)

def packed(save, *args, **kwargs):
    """What torch.save(object, file) or np.savez(file, ...) would write, as bytes."""
    file = io.BytesIO()
    save(*args, file) if save is torch.save else save(file, *args, **kwargs)
    return file.getvalue()

def digest(data):
    return hashlib.sha256(data).hexdigest()[:12]

def cache_path(cfg, name, key):
    """A file in <data-dir>/annotations/ named after all that its content depends on."""
    name = name.replace(".", f"-{digest(json.dumps(key).encode())}.")
    return Path(cfg.data_dir) / "annotations" / f"{cfg.dataset}-{name}"

def report_broken(names, kept):
    broken = [str(name) for row, name in enumerate(names) if row not in kept]
    if broken:
        print(f"skipped: {len(broken)} of {len(names)} images cannot be read, such as",
              ", ".join(broken[:5]), file=sys.stderr)

def read_images(pairs, cfg, task):
    """Pairs -> (uint8 [N,C,S,S], labels int [N] or None, those pairs that can be read, names).
    A folder's images are decoded once, into one array on disk that is mapped, not read, later."""
    shape, names = (len(pairs), cfg.channels, cfg.image_size, cfg.image_size), range(len(pairs))
    path, transform = None, partial(to_square, size=cfg.image_size, channels=cfg.channels)
    if isinstance(pairs.dataset, Files):
        names = [str(pairs.dataset.paths[i]) for i in pairs.indices]
        stamps = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in names]
        path = cache_path(cfg, "images.npy",
                          [shape, stamps, cfg.needs_labels, pairs.dataset.classes])
    try:
        kept, labels = json.loads(path.with_suffix(".json").read_text())
        array = np.load(path, mmap_mode="c")
    except (AttributeError, OSError, ValueError):  # no path, no file, or one that is cut off
        array, kept, labels = np.empty(shape, np.uint8), [], []
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        for images, some, rows in load_batches(pairs, transform, task, cfg.num_workers):
            array[len(kept):len(kept) + len(rows)] = images if rows else 0
            kept, labels = kept + rows, labels + some
        if path:  # the neighbour comes last: it says that the array is complete
            array.flush()
            write_atomically(path.with_suffix(".json"), json.dumps([kept, labels]).encode())
    report_broken(names, set(kept))
    labels = None if -1 in labels or not kept else torch.tensor(labels)
    names = [names[row] for row in kept]
    return torch.from_numpy(array[:len(kept)]), labels, Subset(pairs, kept), names

# (2) CLIP annotation -> candidate label sets -----------------------------------------------------
# Template t and class k give the text feature u_tk, image i gives v_i; P[t,i,:] is the softmax
# over k of logit_scale * v_i . u_tk. The candidate set S_i is what the single templates answer:
# small where they agree, and perhaps without the true label (paper, section 3.1).

def candidate_sets(probs, mode="multi_prompt", top_k=5, ratio=0.5):
    """probs [T,N,K], rows sum to 1 -> candidate sets bool [N,K]. Modes: multi_prompt: the argmax of
    every template. Of the mean over templates: argmax; top_k: the `top_k` largest (at most K);
    ratio: those of them that reach `ratio` (0..1) times the largest. Others: ValueError."""
    sets = torch.zeros_like(probs[0], dtype=torch.bool)  # [N,K]
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
    the true label is swapped for one from outside the set (a full set stays as it is)."""
    n, true = len(labels), F.one_hot(labels, num_classes).bool()  # [N,K]
    sets = true | (torch.rand(n, num_classes, generator=generator) < partial_rate)
    # The largest of independent random numbers is a uniform draw among the labels outside the set.
    drawn = torch.rand(n, num_classes, generator=generator).masked_fill(sets, -1).argmax(1)
    swap = (torch.rand(n, generator=generator) < noise_rate) & ~sets.all(1)  # [N]
    return torch.where(swap[:, None], (sets & ~true) | F.one_hot(drawn, num_classes).bool(), sets)

@torch.inference_mode()
def annotate(model, tokenizer, batches, class_names, templates, device):
    """Class probabilities float16 [T,N,K] of every template, for batches of preprocessed images."""
    prompts = [tokenizer([t.format(name) for name in class_names]).to(device) for t in templates]
    texts = torch.stack([model.encode_text(p, normalize=True) for p in prompts])  # [T,K,D]
    probs = [torch.empty(len(templates), 0, len(class_names), dtype=torch.half)]
    for images, *_ in batches:
        features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        logits = model.logit_scale.exp() * torch.einsum("bd,tkd->tbk", features, texts)
        probs.append(logits.float().softmax(2).half().cpu())
    return torch.cat(probs, 1)

def read_annotations(path, num_images, num_classes, cfg):
    """Anybody's annotations -> (candidate sets bool [N,K], mean label shares [N,K]). The .npz holds
    `candidates` bool [N,K], or `probs` [T,N,K], or `votes` int [T,N], -1: abstained."""
    with advice(f"--annotations {path}: expected an .npz with `candidates`, `probs` or `votes`"):
        with np.load(path, allow_pickle=False) as file:
            name = next(name for name in ("candidates", "probs", "votes") if name in file)
            array = torch.from_numpy(file[name])
        shape = dict(candidates=[num_images, num_classes], votes=[len(array), num_images],
                     probs=[len(array), num_images, num_classes])[name]
    low, high = (-1, num_classes - 1) if name == "votes" else (0, 1)
    good = (array >= low) & (array <= high + 1e-3)  # NaN is not good
    expect(good.all() and len(array) and list(array.shape) == shape
           and not (name == "votes" and array.is_floating_point()), f"--annotations {path}: {name}",
           f"{shape} (N={num_images}, K={num_classes}), numbers from {low} to {high}",
           f"{list(array.shape)} of {array.dtype}, {int((~good).sum())} out of range")
    if name == "votes":
        shares = sum(F.one_hot(votes.long() + 1, num_classes + 1)[:, 1:] for votes in array)
    else:
        shares = array.float().mean(0) if name == "probs" else array
    empty = ~shares.bool().any(1)  # [N]
    if empty.any():
        print(f"annotation: {int(empty.sum())} images have no label: all classes are candidates")
    shares = F.normalize(shares.float() + empty[:, None], p=1, dim=1)  # [N,K]
    if cfg.candidates not in ("multi_prompt", "soft"):
        return candidate_sets(shares[None], cfg.candidates, cfg.top_k, cfg.ratio), shares
    return (candidate_sets(array) | empty[:, None] if name == "probs" else shares > 0), shares

def load_clip(cfg, device):
    """open_clip's model, its preprocessing of PIL images, and its tokenizer."""
    import open_clip  # here, so that `import coreg` stays light
    name, weights = cfg.clip_model, cfg.clip_pretrained
    hub = open_clip.get_pretrained_cfg(name, weights).get("hf_hub", "")
    hub += "open_clip_model.safetensors" * hub.endswith("/")
    tags = open_clip.list_pretrained_tags_by_model(name)
    near = difflib.get_close_matches(name, open_clip.list_models())
    hint = (f"download huggingface.co/{hub} and pass its path to --clip-pretrained" if hub else
            f"expected a file made for it, one of its tags {tags}, or another model, as {near}")
    logging.disable(logging.ERROR)  # what it logs before it raises is said here, in one line
    try:
        with advice(f"--clip-model {name} --clip-pretrained {weights} did not load: {hint}"):
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, weights, device=device, require_pretrained=True)
    finally:
        logging.disable(logging.NOTSET)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)

# TinyCLIP, the annotator of the digits, is open_clip's CLIP class and tokenizer in a tiny size,
# trained on ANOTHER domain: glyphs of Pillow's two fonts under random geometry, with captions that
# truly describe the drawing. It has never seen a handwritten digit.
TINY_STEPS, TINY_BATCH, TINY_SEED = 600, 128, 0

def draw_glyphs(size=64, height=52):
    """The digits in Pillow's outline font (0-9) and in its bitmap font (10-19): [20,1,64,64]."""
    glyphs = []
    for font in (ImageFont.load_default(size=64), ImageFont.load_default_imagefont()):
        for digit in "0123456789":
            image = Image.new("L", (96, 96))
            ImageDraw.Draw(image).text((8, 8), digit, fill=255, font=font)
            image = ImageOps.contain(image.crop(image.getbbox()), (size, height))
            glyphs.append(TF.center_crop(TF.pil_to_tensor(image), size) / 255)
    return torch.stack(glyphs)

def render_glyphs(glyphs, classes, side=32):
    """Classes [B] -> images [B,1,8,8] in [0,1], and which of the digit templates are true [B,T]."""
    n, column = len(classes), (-1, 1, 1, 1)
    def uniform(low, high): return torch.rand(n) * (high - low) + low
    def ends(hit): return hit.int().argmax(1), side - hit.flip(1).int().argmax(1)  # [B,S] -> [B]
    angle, shear, waist = uniform(-.25, .25), uniform(-.4, .4), uniform(-.3, .3)
    wide, tall, wobble = uniform(.8, 1.4), uniform(.95, 1.25), uniform(0, .2)
    font, stroke, blur = torch.randint(2, (n,)), torch.randint(3, (n,)), torch.rand(n) < .25
    cos, sin = angle.cos(), angle.sin()
    turn = ((cos + shear * sin) / wide, (shear * cos - sin) / wide, 0, sin / tall, cos / tall, 0)
    noise = F.interpolate(torch.randn(n, 2, 4, 4), size=side, mode="bicubic").permute(0, 2, 3, 1)
    lean = torch.stack([uniform(-.15, .15), waist], 1).view(n, 1, 1, 2)  # of the middle alone
    middle = 1 - ((2 * torch.arange(side) + 1) / side - 1) ** 2  # [S]: 1, and 0 at both borders
    middle = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), 2)  # [S,S,2]
    images = warp(F.avg_pool2d(glyphs, 2)[classes + 10 * font], turn, "bilinear",
                  wobble.view(column) * noise + lean * middle)
    for i in (1, 2):  # thicken the stroke by one pixel, and by one more
        thick = F.max_pool2d(F.pad(images, (i - 1, 2 - i, i - 1, 2 - i)), 2, 1)
        images = torch.where((stroke >= i).view(column), thick, images)
    images = torch.where(blur.view(column), F.avg_pool2d(images, 5, 1, 2), images)
    ink = images[:, 0] > .4 * images.amax((2, 3))[..., None]  # cut there, like the real digits
    (top, bottom), (left, right) = ends(ink.any(2)), ends(ink.any(1))
    height = (bottom - top).clamp_min(4) / side
    width = torch.maximum((right - left) / side, height * uniform(1, 1.4))
    box = (width, 0, (left + right) / side - 1, 0, height, (top + bottom) / side - 1)
    images = F.avg_pool2d(warp(images, box, "bilinear"), side // 8)
    true = torch.stack([  # in the order of the templates; the plain one is chosen less often
        torch.full((n,), .35), stroke == 2, stroke == 0, wide < .95, wide > 1.25, shear.abs() > .25,
        angle.abs() > .17, wobble > .14, blur, waist < -.18, waist > .18, font == 1])
    return images / images.amax((1, 2, 3), keepdim=True).clamp_min(.05), true.T

def tiny_preprocess(image):
    return TF.pil_to_tensor(TF.resize(image.convert("L"), [8, 8])) / 127.5 - 1  # [1,8,8] in -1..1

def load_tiny(folder, device):
    """TinyCLIP, its preprocessing and tokenizer; pre-trained at first use and kept in `folder`."""
    import open_clip
    torch.manual_seed(TINY_SEED)
    model = open_clip.CLIP(64, dict(image_size=8, patch_size=8, layers=1, width=8, head_width=8),
                           dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1))
    sizes = [(1, 24, 3, 1), (24, 48, 3, 2), (48, 48, 3, 1), (48, 96, 3, 2)]  # in, out, side, stride
    model.visual = nn.Sequential(  # in place of the transformer: convolutions suit 8x8 pixels
        *(Conv2dNormActivation(*size) for size in sizes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 64))
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    path = folder / f"tiny-clip-{TINY_STEPS}x{TINY_BATCH}-{TINY_SEED}.pt"
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # not there yet, or not readable: train it (anew)
        print(f"TinyCLIP: pre-training on {TINY_STEPS * TINY_BATCH:,} rendered digits")
        pretrain_tiny(model, tokenizer([t.format(d) for t in TEMPLATES["digits"] for d in DIGITS]))
        write_atomically(path, packed(torch.save, model.state_dict()))
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

def cached_annotation(cfg, datasets, pixels, class_names, templates, device):
    """Probabilities float16 [T,N,K] of each dataset, from the cache or from the annotator.
    DIFFERS: the published cache knows only its folder, so an unseeded split could pair it with
    other images. This one is named after the pixels, weights, class names and templates."""
    weights, tiny = Path(cfg.clip_pretrained), cfg.annotator == "tiny"
    made_by = ["tiny", [TINY_STEPS, TINY_BATCH, TINY_SEED]] if tiny else [
        cfg.clip_model, digest(weights.read_bytes()) if weights.is_file() else str(weights)]
    path = cache_path(cfg, cfg.annotator + ".npz", [SPLIT_SEED, class_names, templates, *made_by,
                                                    [digest(p.numpy()) for p in pixels]])
    try:
        with np.load(path, allow_pickle=False) as file:
            probs = [torch.from_numpy(file[name]) for name in ("probs", "test_probs")]
            print(f"annotation: read from {path}")
            return probs
    except Exception:  # not there, or cut off, which raises many kinds
        print("annotation: made now" + f", since {path} cannot be read" * path.exists())
    model, prepare, tokenizer = load_tiny(path.parent, device) if tiny else load_clip(cfg, device)
    batches = (load_batches(pairs, prepare, "annotate", cfg.num_workers) for pairs in datasets)
    probs = [annotate(model, tokenizer, some, class_names, templates, device) for some in batches]
    write_atomically(path, packed(np.savez, probs=probs[0], test_probs=probs[1]))
    print(f"annotation: written to {path}")
    return probs

def label_sets(cfg, datasets, pixels, labels, class_names, templates, device):
    """From whoever annotates -> candidates bool [N,K], shares [N,K] (mean over annotators, rows sum
    to 1), test_probs float16 [T,N,K] or None. labels: read by `flip` alone."""
    if cfg.annotator == "flip":
        print("annotation: synthetic sets from the TRUE labels: a study of noise, not a result")
        candidates = flip_candidates(labels, len(class_names), cfg.partial_rate, cfg.noise_rate,
                                     torch.Generator().manual_seed(cfg.seed))
        return candidates, F.normalize(candidates.float(), p=1, dim=1), None
    if cfg.annotations:
        return *read_annotations(cfg.annotations, len(pixels[0]), len(class_names), cfg), None
    probs, test_probs = cached_annotation(cfg, datasets, pixels, class_names, templates, device)
    rule = "multi_prompt" if cfg.candidates == "soft" else cfg.candidates
    candidates = candidate_sets(probs, rule, cfg.top_k, cfg.ratio)
    return candidates, probs.mean(0, dtype=torch.float32), test_probs

# (3) Weak and strong views -----------------------------------------------------------------------
# Images rest as uint8. A view is made for a whole batch [B,C,S,S] in [0,1] by tensor operations:
# weak = random crop and flip; strong = weak, one random operation per image, and a grey square.
# Random numbers are drawn on the CPU: the same seed gives the same views on every device.

def warp(images, coefficients, mode="nearest", bend=0):
    """Each image of [B,C,S,S] under its own affine map: what (x,y), in -1..1, shows comes from
    (ax+by+c, dx+ey+f) + bend; black outside. coefficients a..f: numbers or [B]; bend [B,S,S,2]."""
    if not len(images):
        return images
    theta = torch.stack([images.new_zeros(len(images)) + value for value in coefficients], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), images.shape, align_corners=False) + bend
    return F.grid_sample(images, grid, mode, align_corners=False)

def random_crop(images, padding, flip):
    """[B,C,S,S], each shifted by up to `padding` whole pixels (black comes in), half mirrored."""
    n, side = len(images), images.shape[-1]
    y, x = 2 / side * (torch.randint(2 * padding + 1, (2, n)) - padding).to(images.device)
    mirror = torch.where(torch.rand(n) < (0.5 if flip else 0), -1, 1).to(images.device)
    return warp(images, (mirror, 0, x, 0, 1, y))

def rotate(images, angle, scale=1, shift_x=0, shift_y=0, mode="nearest"):
    """Turn counter-clockwise by `angle` [B] in radians about the centre, scaled and shifted."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    return warp(images, (cos, -sin, shift_x, sin, cos, shift_y), mode)

def blend(base, images, share):
    return torch.lerp(base, images, share.view(-1, 1, 1, 1))  # share [B]: one number per image

def posterize(images, bits):
    step = 2 ** (8 - bits.view(-1, 1, 1, 1))  # keep the upper `bits` [B] of each 8-bit value
    return (images * 255).round().div(step, rounding_mode="floor") * step / 255

# RandAugment: images [B,C,S,S] in [0,1] and for each a strength u [B], uniform in [0,1).
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
    "shear_x": lambda x, u: warp(x, (1, .6 * u - .3, .6 * u - .3, 0, 1, 0)),  # the top edge stays
    "shear_y": lambda x, u: warp(x, (1, 0, 0, .6 * u - .3, 1, .6 * u - .3)),  # the left edge stays
    "translate_x": lambda x, u: warp(x, (1, 0, 1.2 * u - .6, 0, 1, 0)),  # 0.6 in -1..1 is 0.3 sides
    "translate_y": lambda x, u: warp(x, (1, 0, 0, 0, 1, 1.2 * u - .6))}

def random_operation(images):
    """One operation with one strength per image [B,C,S,S]: each runs once, on its own images."""
    choice = torch.randint(len(OPERATIONS), (len(images),))  # stays on the CPU: nothing waits
    changed, strength = torch.empty_like(images), torch.rand(len(images)).to(images.device)
    for number, operation in enumerate(OPERATIONS.values()):
        rows = (choice == number).nonzero()[:, 0].to(images.device)
        if len(rows):
            changed[rows] = operation(images[rows], strength[rows])
    return changed.clamp_(0, 1)

def random_affine(images, turn, scale, shift):
    """Turn by up to `turn` degrees, scale and shift by up to these shares; [B,C,S,S] in [0,1]."""
    u = (2 * torch.rand(4, len(images)) - 1).to(images.device)
    return rotate(images, math.radians(turn) * u[0], 1 + scale * u[1], 2 * shift * u[2],
                  2 * shift * u[3], "bilinear")

def cutout(images, low, high):
    """A grey square at a random place of each image, its side uniform in low..high pixels."""
    n, side = len(images), images.shape[-1]
    half = (low + (high - low) * torch.rand(n, 1)) / 2
    hit = (torch.arange(side) + 0.5 - side * torch.rand(2, n, 1)).abs() < half  # [2,B,S]
    rows, columns = hit.to(images.device)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.5)

def channel_statistics(images):
    """Mean and deviation [1,C,1,1] of each channel of uint8 images [N,C,S,S], scaled to 0..1.
    DIFFERS: measured on the training images, so that any data are normalised; published: typed."""
    some = images[::math.ceil(len(images) / 10_000)].float() / 255  # 10,000 images tell enough
    std = some.std((0, 2, 3), keepdim=True).clamp_min(1 / 255)  # safe: a single colour
    return some.mean((0, 2, 3), keepdim=True), std

class Views:
    """uint8 batches [B,C,S,S] -> normalised float views of a kind that Config.views names."""
    def __init__(self, kind, mean, std):
        self.kind, self.mean, self.std = kind, mean, std

    def plain(self, images):
        images = images / 255 if images.dtype == torch.uint8 else images
        return (images - self.mean) / self.std

    def moved(self, images):
        if self.kind == "digit":
            return random_affine(images / 255, turn=0, scale=0, shift=1 / 16)
        return random_crop(images / 255, round(images.shape[-1] / 8), flip=self.kind != "sign")

    def weak(self, images): return self.plain(self.moved(images))

    def strong(self, images):
        side = images.shape[-1]
        if self.kind == "digit":
            images = random_affine(images / 255, turn=20, scale=0.15, shift=0.1)
            return self.plain(cutout(images, 0, side / 3))
        if self.kind == "grey":
            return self.plain(cutout(self.moved(images), 16, 16))
        return self.plain(cutout(random_operation(self.moved(images)), 0, side / 2))

# (4) Both networks -------------------------------------------------------------------------------
# Two pre-activation ResNet-18 (paper, section 4.1) that differ only in their random start. Each has
# a linear classifier and an MLP head whose unit-norm output z serves the representation losses, a
# momentum copy (MoCo's key encoder) and a queue of past keys (section 9).

class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, plus a shortcut that always starts after the first BN-ReLU."""
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        # A strided 1x1 convolution, in two steps: oneDNN's own (seen with torch 2.6 and 2.14)
        # writes out of bounds in its backward pass: under 16 channels, channels last.
        self.shortcut = nn.Identity() if stride == 1 and in_channels == channels else nn.Sequential(
            nn.AvgPool2d(1, stride), nn.Conv2d(in_channels, channels, 1, bias=False))

    def forward(self, x):
        a = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + self.shortcut(a)

class CoRegNet(nn.Module):
    """Images [B,C,S,S] -> (logits [B,K], unit-norm embeddings [B,D]), for any side S from 8.
    11,499,594 parameters for 10 classes, 32 pixels and width 64, as in the published code."""
    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128):
        super().__init__()
        strides = (2 if image_size >= 64 else 1, 2, 2, 2)  # large images are halved once more
        layers = [Conv2dNormActivation(in_channels, width)]  # 3x3, BatchNorm, ReLU
        for dim, stride in zip((width, 2 * width, 4 * width, 8 * width), strides):
            layers += [PreActBlock(max(width, dim // 2), dim, stride), PreActBlock(dim, dim, 1)]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # [B, 8*width]
        self.fc = nn.Linear(dim, num_classes)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, embedding_dim))
        self.bf16 = False  # convolutions in bfloat16; what leaves the network is float32

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, self.bf16):
            features = self.encoder(images)
            logits, embeddings = self.fc(features), self.head(features)
        return logits.float(), F.normalize(embeddings.float(), dim=1)

def device_of(net):
    return next(net.parameters()).device

class Learner:
    """One of the two networks, with all the state that belongs to it."""
    def __init__(self, net, cfg):
        self.net, self.key_net = net, copy.deepcopy(net).requires_grad_(False)
        self.queue = MomentumQueue(cfg.queue_size, cfg.embedding_dim).to(device_of(net))
        self.losses = []  # of the last splits, [N] each: input of the mixture model (section 6)
        self.optimizer = torch.optim.SGD(  # momentum and weight decay: paper, section 4.1
            net.parameters(), cfg.lr, momentum=0.9, weight_decay=5e-4)

    def step(self, terms):
        """One optimizer step on the sum of the terms {name: scalar}; returns them, detached."""
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def state(self):
        """All of it, for a checkpoint."""
        return {name: value if name == "losses" else value.state_dict()
                for name, value in vars(self).items()}

    def restore(self, state):
        self.losses = [losses.to(device_of(self.net)) for losses in state["losses"]]
        for name in state.keys() - {"losses"}:
            getattr(self, name).load_state_dict(state[name])

# (5) Warm-up -------------------------------------------------------------------------------------
# For the first epochs each network learns alone, on strong views, that its candidate set as a whole
# should have probability 1: L = partial cross-entropy + negative entropy (paper, section 3.2). The
# second term keeps predictions soft, so that wrong sets are not yet learnt by heart.

def partial_cross_entropy(logits, candidates):
    """Mean of -log(sum_{k in S_i} p_ik + 1e-5) over rows with |S_i| < K; 0 without such a row.
    logits [B,K] (gets the gradient), candidates bool [B,K] -> scalar."""
    partial_rows = ~candidates.all(1)  # [B]: a full set says nothing
    loss = -((logits.softmax(1) * candidates).sum(1) + 1e-5).log()  # 1e-5: published code
    return (loss * partial_rows).sum() / partial_rows.sum().clamp_min(1)

def negative_entropy(logits):
    """mean_i sum_k p_ik log p_ik, at most 0: the confidence penalty. logits [B,K] -> scalar."""
    log_probs = logits.log_softmax(1)
    return (log_probs.exp() * log_probs).sum(1).mean()

def batches(rows, batch_size):
    """rows [n] in random batches; a row left alone joins the last one: BatchNorm needs two."""
    parts = list(rows[torch.randperm(len(rows))].split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts

def warm_up_epoch(own, images, candidates, views, cfg):
    """Every image once, in batches of 2B; yields each step's loss terms. Candidates that are soft
    labels (float [N,K]) are learnt by plain cross-entropy: distillation, no sets."""
    own.net.train()
    for rows in batches(torch.arange(len(images)), 2 * cfg.batch_size):
        logits, _ = own.net(views.strong(images[rows].to(candidates.device, non_blocking=True)))
        targets = candidates[rows]
        yield own.step({"set": F.cross_entropy(logits, targets)} if targets.is_floating_point() else
                       {"set": partial_cross_entropy(logits, targets),
                        "entropy": negative_entropy(logits)})

# (6) GMM split -----------------------------------------------------------------------------------
# At the start of each later epoch every network judges all candidate sets: one that holds the true
# label is learnt early, so its loss l_i = -log max_{k in S_i} p_ik is small. A mixture of two
# Gaussians over l gives w_i, the probability that set i is clean (paper, section 3.3).

def align_distribution(probs, mean_probs, prior):
    """normalise(p * prior / mean_probs): pulls the mean prediction towards the prior.
    probs [B,K], mean_probs [K] (mean prediction over the data), prior [K] -> [B,K]."""
    return F.normalize(probs * prior / mean_probs.clamp_min(1e-8), p=1, dim=1)  # 1e-8: unseen class

def max_candidate_loss(probs, candidates):
    """-log max_{k in S_i} p_ik [B], finite also where p underflows; probs, candidates [B,K]."""
    return -(probs * candidates).amax(1).clamp_min(torch.finfo(probs.dtype).tiny).log()

def clean_probability(loss_history, window=5, seed=0):
    """Raw losses [E,N], newest last -> probability [N] that a sample is of the low-loss group.
    Each epoch is scaled to 0..1, the last `window` are averaged, a two-component mixture is fitted.
    All zeros where none can be fitted (constant losses, one sample); an infinite loss is worst."""
    losses = loss_history[-window:].float()
    finite = losses.isfinite()
    high = losses.masked_fill(~finite, -math.inf).amax(1, keepdim=True)  # [E,1]
    losses = torch.where(finite, losses, high)
    low = losses.amin(1, keepdim=True)
    mean = ((losses - low) / (high - low).clamp_min(1e-12)).mean(0)  # [N]
    if not mean.isfinite().all() or mean.max() == mean.min():
        return torch.zeros_like(mean)
    values = mean.cpu().numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten rounds without convergence are normal here
        posterior = mixture.fit(values).predict_proba(values)  # [N,2]
    return torch.from_numpy(posterior[:, mixture.means_.argmin()]).to(mean).nan_to_num(0)

@torch.no_grad()
def split_data(learner, images, views, candidates, prior, cfg):
    """One pass over weak views in eval mode, then the mixture -> (probs [N,K], clean_prob [N]).
    DIFFERS: predictions are aligned with the mean of this very pass; the published code uses a
    table that is half of the last epoch's. And where less than a batch is clean (less than a tenth,
    if the data are few), the tenth with the lowest losses is; the published code crashes."""
    probs = predict(learner.net, images, views.weak).softmax(1)  # [N,K]
    if "alignment" not in cfg.ablate:
        probs = align_distribution(probs, probs.mean(0), prior)
    losses = max_candidate_loss(probs, candidates)
    learner.losses = (learner.losses + [losses])[-5:]
    if "gmm" in cfg.ablate:
        return probs, torch.ones_like(losses)
    clean_prob = clean_probability(torch.stack(learner.losses), seed=cfg.seed)
    count, tenth = int((clean_prob > 0.5).sum()), max(2, math.ceil(len(losses) / 10))
    if count < min(cfg.batch_size, tenth):
        print(f"split: {count} clean samples are too few: the {tenth} of lowest loss count")
        lowest = losses.topk(tenth, largest=False).indices
        clean_prob = torch.zeros_like(losses).index_fill_(0, lowest, 1)
    return probs, clean_prob

# (7) Co-pseudo-labeling, with sharpening and mixup -----------------------------------------------
# A clean sample keeps its candidate set: its target is the partner's prediction in S_i, weighted
# w, plus the own prediction, weighted 1-w. An unlabeled sample takes the mean of both networks. The
# network then learns from mixtures of strong views (paper, section 3.3; MixMatch, DivideMix).

def sharpen(probs, temperature):
    """normalise(p^(1/temperature)), [B,K]; a temperature below 1 makes labels more certain."""
    relative = probs / probs.amax(1, keepdim=True)  # so that the largest power is 1, never 0
    return F.normalize(relative ** (1 / temperature), p=1, dim=1)

def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets [B,K] of clean samples: sharpen(w r + (1-w) o).
    own_probs [B,K]: o, the mean of the own softmax on both weak views. partner_probs [B,K] are
    restricted to the bool candidates [B,K] here, which gives r. clean_prob [B]: w."""
    inside = partner_probs.clamp_min(1e-12) * candidates  # where all underflow, they count alike
    restricted = F.normalize(inside, p=1, dim=1)
    return sharpen(torch.lerp(own_probs, restricted, clean_prob[:, None]), temperature)

def guess_labels(probs, temperature):
    """Targets [B,K] of unlabeled samples: sharpened mean over views and networks, probs [V,B,K]."""
    return sharpen(probs.mean(0), temperature)

def mixup(inputs, targets, lam, permutation):
    """lam * row + (1 - lam) * permuted row, for inputs [B,...] and targets [B,K]; lam in 0.5..1."""
    return tuple(torch.lerp(t[permutation], t, lam) for t in (inputs, targets))

def ramp_up(epoch, warm_up, length=16):
    """From 0 at the end of the warm-up to 1 `length` epochs later; epoch may be a fraction."""
    return min(max((epoch - warm_up) / length, 0.0), 1.0)

def squared_error(probs, targets):
    """Mean of (p - t)^2 over all entries of [B,K]; 0 for an empty batch."""
    return ((probs - targets) ** 2).sum() / max(1, probs.numel())

def self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u):
    """Cross-entropy of clean rows + weight_u * squared error of unlabeled rows (0 if none).
    All [B,K] -> scalar; the logits get the gradient."""
    error_u = squared_error(logits_u.softmax(1), targets_u)
    return F.cross_entropy(logits_x, targets_x) + weight_u * error_u

# (8) Prototype EMA alignment ---------------------------------------------------------------------
# A prototype c_k is the moving average of the embeddings of clean images of pseudo-class k; softmax
# over z . c / tau is a second classifier, pulled towards the same targets (paper, section 3.4).
# Both networks share one set, as published, although their heads are unrelated.

def update_prototypes(prototypes, embeddings, classes, momentum):
    """c_k <- m c_k + (1-m) z for one sample after the other, then unit rows; returns new [K,D].
    prototypes [K,D], embeddings [B,D], classes int [B]. In closed form, with n samples of class k:
    c_k <- m^n c_k + (1-m) sum_j m^(number of later samples) z_j. A zero row stays if not hit."""
    hits = F.one_hot(classes, len(prototypes)).to(embeddings.dtype)  # [B,K]
    later = hits.flip(0).cumsum(0).flip(0) - hits  # [B,K]: samples of the class that follow
    weights = hits * (1 - momentum) * momentum ** later  # [B,K]
    kept = momentum ** hits.sum(0)[:, None] * prototypes
    return F.normalize(kept + weights.T @ embeddings, dim=1)

def prototype_loss(similarity_x, targets_a_x, targets_b_x, similarity_u, targets_a_u, targets_b_u,
                   lam, temperature, weight_u=1.0):
    """lam KL(a || q) + (1-lam) KL(b || q) on clean rows + weight_u * the like of squared errors.
    q = softmax(similarity / temperature), similarity [B,K] = z . c gets the gradient; a, b [B,K]
    are the targets of the images that mixup joined. KL: mean over rows; error: over entries."""
    log_q = (similarity_x / temperature).log_softmax(1)
    q_u = (similarity_u / temperature).softmax(1)
    return sum(share * (F.kl_div(log_q, target_x, reduction="batchmean")
                        + weight_u * squared_error(q_u, target_u)) for share, target_x, target_u in
               ((lam, targets_a_x, targets_a_u), (1 - lam, targets_b_x, targets_b_u)))

# (9) MoCo queue and the noisy supervised contrastive loss ----------------------------------------
# An anchor (query) is pulled to images of its pseudo-class, if both are clean, and always to its
# own key (the key encoder's view of the same image). Same class, but not both clean: such a pair
# is neither positive nor negative (paper, section 3.4). Past keys wait in a queue.

class MomentumQueue(nn.Module):
    """Ring buffer of the last Q = `size` keys [Q,D] with their classes [Q] and clean flags [Q].
    DIFFERS: only filled slots are seen; the published queue starts full of random numbers."""
    def __init__(self, size, dim):
        super().__init__()
        self.size, self.pushed = size, 0
        self.register_buffer("slots", torch.zeros(size, dim))
        self.register_buffer("slot_classes", torch.zeros(size, dtype=torch.long))
        self.register_buffer("slot_clean", torch.zeros(size, dtype=torch.bool))
    keys = property(lambda self: self.slots[:self.pushed])
    classes = property(lambda self: self.slot_classes[:self.pushed])
    clean = property(lambda self: self.slot_clean[:self.pushed])
    def get_extra_state(self): return self.pushed  # a number on the CPU: reading it never waits
    def set_extra_state(self, pushed): self.pushed = pushed

    def push(self, keys, classes, clean):
        """keys [B,D], classes int [B], clean bool [B] take the next slots; the oldest go."""
        keys, classes, clean = (new[-self.size:] for new in (keys.detach(), classes, clean))
        places = (self.pushed + torch.arange(len(keys), device=keys.device)) % self.size
        self.slots[places] = keys
        self.slot_classes[places], self.slot_clean[places] = classes, clean
        self.pushed += len(keys)

def contrastive_masks(classes, clean, num_anchors):
    """classes int, clean bool [M] of [anchors, their keys, queue] -> (positives, ignored) [A,M].
    positives: same class and both clean, and the own key, at column i + A (an anchor itself too:
    supcon_loss removes it). ignored: same class but not both clean, except the own key."""
    same = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean
    own_key = torch.zeros_like(same)
    own_key.diagonal(num_anchors).fill_(True)
    return (same & both_clean) | own_key, same & ~both_clean & ~own_key

def supcon_loss(features, positives, ignored, temperature):
    """Mean over anchors of the mean over positives of -log softmax of the similarities -> scalar.
    features [M,D] unit rows, first the A anchors. positives, ignored bool [A,M]; with `ignored` all
    False this is SupCon. DIFFERS: ignored entries are -inf in a logsumexp; the published difference
    of two large sums can turn negative."""
    logits = features[:len(positives)] @ features.T / temperature  # [A,M]
    itself = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    log_norm = logits.masked_fill(ignored | itself, -math.inf).logsumexp(1, keepdim=True)
    positives = positives & ~itself
    total = (log_norm - logits).masked_fill(~positives, 0).sum(1)  # [A]
    return (total / positives.sum(1).clamp_min(1)).mean()

MIXUP_ALPHA, PROTO_TEMPERATURE, CONTRASTIVE_TEMPERATURE = 4.0, 0.3, 0.07  # paper, section 4.1

def co_training_terms(own, partner_net, prototypes, weak, strong, candidates, clean_prob,
                      partner_probs, lam, permutation, weight_u, representation, cfg):
    """One batch of co-training of network `own` -> ({name: loss term}, new prototypes).
    weak, strong [2B_x+2B_u,C,S,S]: two views of all clean rows, then two of all unlabeled rows (B_u
    may be 0). candidates bool [B_x,K], clean_prob [B_x], partner_probs [B_x,K]. lam, permutation
    [2B_x+2B_u]: mixup. representation: are sections 8 and 9 on? partner_probs come from split_data.
    Expects own.net, own.key_net in train mode, partner_net in eval; moves own.key_net and queue."""
    num_x, num_u = len(candidates), len(weak) // 2 - len(candidates)
    x, u = slice(2 * num_x), slice(2 * num_x, None)  # after mixup too, whatever was mixed in
    with torch.no_grad():  # the own network labels in train mode, as published
        # DIFFERS: all weak views share one forward pass of it, so also their batch statistics.
        logits_w, embeddings_w = own.net(weak)
        probs_w = logits_w.softmax(1)
        targets_x = refine_labels(probs_w[x].unflatten(0, (2, num_x)).mean(0), partner_probs,
                                  candidates, clean_prob, cfg.temperature)
        probs_u = probs_w[u].unflatten(0, (2, num_u))  # [V,B,K]
        if num_u and partner_net is not own.net:  # the same: ablation of co-pseudo-labeling
            partner_probs_u = partner_net(weak[u])[0].softmax(1)
            probs_u = torch.cat([probs_u, partner_probs_u.unflatten(0, (2, num_u))])
        targets_u = guess_labels(probs_u, cfg.temperature)
    targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
    inputs, mixed = mixup(strong, targets, lam, permutation)
    logits, embeddings = own.net(inputs)
    terms = {"self": self_training_loss(logits[x], mixed[x], logits[u], mixed[u], weight_u)}
    if not representation:  # DIFFERS: the published code computes the rest, then drops it
        return terms, prototypes

    if cfg.proto_weight:
        prototypes = update_prototypes(
            prototypes, embeddings_w[:num_x], targets_x.argmax(1), cfg.momentum)
        similarity, other = embeddings @ prototypes.T, targets[permutation]
        terms["prototype"] = cfg.proto_weight * prototype_loss(
            similarity[x], targets[x], other[x], similarity[u], targets[u], other[u],
            lam, PROTO_TEMPERATURE, cfg.lambda_u)
    if cfg.contrastive_weight:
        x_s1, x_s2, u_s1, u_s2 = strong.split([num_x, num_x, num_u, num_u])
        _, queries = own.net(torch.cat([x_s1, u_s1]))
        with torch.no_grad():  # the key encoder follows the network as it is before this step
            follow = get_ema_multi_avg_fn(cfg.momentum)
            follow(list(own.key_net.parameters()), list(own.net.parameters()), 0)
            _, keys = own.key_net(torch.cat([x_s2, u_s2]))
        classes = torch.cat([targets_x, targets_u]).argmax(1)  # [B]
        clean, queue = torch.arange(len(classes), device=classes.device) < num_x, own.queue
        positives, ignored = contrastive_masks(torch.cat([classes, classes, queue.classes]),
                                               torch.cat([clean, clean, queue.clean]), len(queries))
        terms["contrastive"] = cfg.contrastive_weight * supcon_loss(
            torch.cat([queries, keys, queue.keys]), positives, ignored, CONTRASTIVE_TEMPERATURE)
        queue.push(keys, classes, clean)
    return terms, prototypes

# (10) Evaluation ---------------------------------------------------------------------------------
# The prediction is the argmax of the sum of both networks' logits. True labels are
# arguments here, None where there are none; training never sees them (but for `--annotator flip`
# and `--method supervised`). Figures that need labels of training images, or a choice made on test
# labels, are diagnostics and marked with *.

EVAL_BATCH = 512

@torch.inference_mode()
def predict(net, images, view):
    """Logits [N,K] of one network in eval mode for a view of uint8 images [N,C,S,S], anywhere."""
    net.eval()
    return torch.cat([net(view(batch.to(device_of(net))))[0]
                      for batch in images.split(EVAL_BATCH)])

def accuracy(scores, labels):
    """Percent of rows of scores [N,K] whose argmax is the label [N]; None without labels."""
    if labels is not None:
        return 100 * (scores.argmax(1) == labels.to(scores.device)).float().mean().item()

def coverage(candidates, labels):
    """Percent of candidate sets bool [N,K] that hold the label [N]; None without labels."""
    if labels is not None:
        hit = candidates.gather(1, labels.to(candidates.device)[:, None])  # [N,1]
        return 100 * hit.float().mean().item()

def evaluate(train_labels, test_labels, test_images, candidates, nets, views, splits):
    """Figures of one epoch: test accuracy of both networks and of each; how good the splits are."""
    figures = {}
    if test_labels is not None:
        one, two = (predict(net, test_images, views.plain) for net in nets)
        for name, logits in dict(test_acc=one + two, test_acc_net1=one, test_acc_net2=two).items():
            figures[name] = accuracy(logits, test_labels)
    if train_labels is not None and splits:
        clean = [clean_prob.cpu() > 0.5 for _, clean_prob in splits]
        precision = [coverage(candidates[c], train_labels[c]) for c in clean]
        figures["clean_precision*"] = sum(precision) / 2
        figures["pseudo_label_acc*"] = accuracy(splits[0][0] + splits[1][0], train_labels)
    return figures

# (11) The training loop, checkpoints and the command line ----------------------------------------
# After the warm-up, every epoch both networks split the data; network 1 then trains on the split of
# network 2, and network 2 on that of network 1 ("co-divide"). One log line and one JSON object an
# epoch; the last epoch is the result.

def setting(default, help, low=None, high=math.inf, **options):
    """A field of Config and flag of the command line: a number from low to high, or a choice."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, options=options))  # of argparse

ABLATIONS = ["co-pl", "mixup", "prototype", "contrastive", "alignment", "gmm", "multi-prompt"]

@dataclasses.dataclass
class Config:
    """All settings, checked. The defaults are the paper's CIFAR-10 run; see DATASETS."""
    dataset: str = setting("digits", "data set; folder: your own images", choices=list(DATASETS))
    data_dir: str = setting("data", "folder of data sets and cached annotations")
    classes: str = setting("", "for folder: names with commas between, or a file of one per line")
    num_samples: int = setting(0, "train on a random subset of so many images; 0: on all", 0)
    image_size: int = setting(32, "side of the network's input in pixels", 8)
    channels: int = setting(3, "1: grey, 3: RGB", choices=[1, 3])
    views: str = setting("photo", "random views; sign: no mirror image, grey: no RandAugment",
                         choices=["photo", "sign", "grey", "digit"])
    num_workers: int = setting(min(8, os.cpu_count() or 1), "processes that decode images", 0)
    annotator: str = setting("clip", "flip: noise on TRUE labels", choices=["clip", "tiny", "flip"])
    clip_model: str = setting("ViT-B-32-quickgelu", "any model of open_clip")
    clip_pretrained: str = setting("openai", "open_clip's tag of its weights, or a local file")
    annotations: str = setting("", "an .npz of candidates, probs or votes, in place of CLIP")
    templates: str = setting("small", "27; imagenet: 80; digits: 12; or a file, one {} per line")
    num_templates: int = setting(0, "use only the first so many templates; 0: all", 0)
    candidates: str = setting("multi_prompt", "rule for the sets; soft: as --method distill",
                              choices=["multi_prompt", "argmax", "top_k", "ratio", "soft"])
    top_k: int = setting(5, "labels in a set, for top_k and ratio", 1)
    ratio: float = setting(0.5, "for ratio: least probability, as a share of the largest", 0, 1)
    partial_rate: float = setting(0.1, "for flip: chance q of each wrong label to join", 0, 1)
    noise_rate: float = setting(0.1, "for flip: chance eta that the true label is missing", 0, 1)
    method: str = setting("co-reg", "or a baseline: on sets, single labels, shares or TRUE labels",
                          choices=["co-reg", "pce", "hard", "distill", "supervised"])
    ablate: str = setting("", "parts to leave out, with commas: " + ", ".join(ABLATIONS))
    epochs: int = setting(800, "epochs in all", 1)
    warm_up: int = setting(50, "epochs of warm-up", 0)
    start_contrastive: int = setting(10, "epochs from there to the representation terms", 0)
    batch_size: int = setting(256, "clean images in a batch", 2)
    lr: float = setting(0.01, "learning rate of SGD", 1e-12)
    lr_period: int = setting(800, "epochs from lr to lr/1000; the paper always has 800", 1)
    width: int = setting(64, "channels of the first stage of the ResNet-18", 1)
    embedding_dim: int = setting(128, "size D of the embeddings", 1)
    prior: str = setting("uniform", "class shares to align with", choices=["uniform", "clip"])
    temperature: float = setting(0.5, "sharpening temperature T", 1e-3)
    lambda_u: float = setting(1.0, "weight of the squared error on unlabeled images", 0)
    proto_weight: float = setting(0.1, "weight of prototype alignment", 0)
    contrastive_weight: float = setting(0.1, "weight of the contrastive loss", 0)
    momentum: float = setting(0.999, "momentum of prototypes and key encoders", 0, 1)
    queue_size: int = setting(8192, "keys Q in each queue", 1)
    seed: int = setting(0, "of networks, order and views", 0, 2 ** 32 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("auto", "auto: bf16 where fast", choices=["auto", "bf16", "fp32"])
    compile: bool = setting(False, "use torch.compile: minutes at first, then faster on a GPU")
    output_dir: str = setting("", "folder of the run; empty: runs/<dataset>, then -2, -3, ...")
    overwrite: bool = setting(False, "replace what --output-dir holds")
    save_every: int = setting(0, "epochs between checkpoints; 0: 1 up to 100 epochs, else 10", 0)
    resume: str = setting("", "run to go on with; alone: the newest", nargs="?", const="newest")
    predict: str = setting("", "label this image, or all below this folder, with --model")
    model: str = setting("", "for --predict: model.pt of a run")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            low, high, value = f.metadata["low"], f.metadata["high"], getattr(self, f.name)
            expect(low is None or low <= value <= high and value < math.inf,  # nor nan
                   flag(f.name), f"{low} to {high}", value)
        expect(self.warm_up < self.epochs, "--warm-up", f"below --epochs {self.epochs} (set both)",
               self.warm_up)
        expect(self.annotator != "tiny" or (self.dataset, self.templates) == ("digits", "digits"),
               "--annotator tiny", "--dataset digits and --templates digits",
               f"{self.dataset} and {self.templates}")
        expect(self.annotator != "flip" or not (self.annotations or self.prior == "clip"),
               "--annotator flip", "no --annotations and no --prior clip", "one of them")
        expect(set(self.ablate.replace(" ", "").split(",")) <= {"", *ABLATIONS}, "--ablate",
               "some of " + ",".join(ABLATIONS), self.ablate)
        self.proto_weight *= "prototype" not in self.ablate
        self.contrastive_weight *= "contrastive" not in self.ablate
        self.candidates = "argmax" if "multi-prompt" in self.ablate else self.candidates
        self.method = "distill" if self.candidates == "soft" else self.method

    @property
    def needs_labels(self):
        return self.annotator == "flip" or self.method == "supervised"

def flag(name):
    return "--" + name.replace("_", "-")

STAGES = dict(dataset="data", annotator="annotation", method="training", prior="details",
              seed="run")  # the first flag of each group of --help

def parse(argv=None, defaults=None):
    """Command line -> Config, with the given defaults or those of the data set that it names."""
    def fail(message): raise CoregError(f"{message}; see python coreg.py --help")
    parser = argparse.ArgumentParser(
        "coreg.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
        description="Unlabeled images + CLIP -> a small classifier. Defaults: of that --dataset.")
    parser.error = fail
    for f in dataclasses.fields(Config):
        if f.name in STAGES:
            group = parser.add_argument_group(STAGES[f.name])
        kind = dict(action="store_true") if f.type is bool else dict(
            type=f.type, metavar=f.type.__name__.upper(), **f.metadata["options"])
        text = f.metadata["help"] + " [%(choices)s]" * ("choices" in kind)
        group.add_argument(flag(f.name), default=f.default, help=text, **kind)
    argv = sys.argv[1:] if argv is None else argv
    first, unknown = parser.parse_known_args([w for w in argv if w not in ("-h", "--help")])
    if unknown:
        near = difflib.get_close_matches(unknown[0], map(flag, vars(first)), 1)
        fail(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    parser.set_defaults(**(defaults or DATASETS[first.dataset].preset))
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.argv = argv  # to parse it again once --resume knows better defaults
    return cfg

def pick_device(name):
    """--device -> torch.device; auto: cuda, else mps, else cpu."""
    have = [kind for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps))
            if backend.is_available()] + ["cpu"]
    with advice(f"--device: expected auto or one of {have} here, got {name}"):
        probe = torch.zeros(1, device=have[0] if name == "auto" else name)
        probe.item()  # the device "meta" computes nothing
    if probe.is_cuda:
        torch.backends.cudnn.benchmark = True  # the fastest convolutions for these sizes
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    return probe.device

def choose_folder(cfg):
    """The folder of the run, not yet created."""
    names = [cfg.output_dir] if cfg.output_dir else (
        f"runs/{cfg.dataset}" + f"-{i}" * (i > 1) for i in range(1, sys.maxsize))
    for folder in map(Path, names):
        if not (folder / "config.json").exists() or (cfg.output_dir and cfg.overwrite):
            return folder
    raise CoregError(f"--output-dir: {folder} holds a run; name another folder, or add --overwrite "
                     "or --resume")

def lock(folder):
    """An open file that keeps other processes out, until this one ends, in whatever way."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and no lock
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CoregError(f"--output-dir: another process works in {folder}; name another")
    return file

FREE = {"data_dir", "num_workers", "device", "compile", "save_every", "output_dir", "resume",
        "overwrite"}  # what may differ between a run and its continuation

def load_checkpoint(cfg):
    """--resume -> (Config of that run, its folder, its checkpoint)."""
    path = Path(cfg.resume)
    if cfg.resume == "newest":
        every = [Path(cfg.output_dir)] if cfg.output_dir else Path("runs").glob(cfg.dataset + "*")
        saved = [folder / "checkpoint.pt" for folder in every if
                 not (folder / "model.pt").exists() and (folder / "checkpoint.pt").exists() and
                 f'"dataset": "{cfg.dataset}"' in "".join(read_lines(folder / "config.json"))]
        expect(saved, "--resume", f"an unfinished run of {cfg.dataset}, or the folder of one",
               "none; to begin a run, leave it out")
        path = max(saved, key=os.path.getmtime)
    path = path / "checkpoint.pt" if path.is_dir() else path
    with advice(f"--resume: {path} is missing, damaged or no checkpoint of this version"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        Config(**state["config"])
    cfg = parse(cfg.argv, state["config"])
    for name, old in state["config"].items():
        new = getattr(cfg, name)
        expect(name in FREE or new == old, flag(name), f"{old} as in {path.parent}", new)
    return cfg, path.parent, state

def cosine_lr(epoch, lr, period):
    """Half cosine from lr at epoch 0 to lr/1000 at epoch `period` and after."""
    low = lr / 1000
    return low + (lr - low) * (1 + math.cos(math.pi * min(epoch, period) / period)) / 2

def co_training_epoch(own, partner, split, prototypes, images, candidates, views, cfg, epoch):
    """The clean samples of the partner's split once, each batch beside an unlabeled one; those
    start again when they are used up. Yields each step's terms; updates `prototypes` in place."""
    # As published, the key encoder starts every epoch as a copy. DIFFERS: BatchNorm buffers too.
    own.key_net.load_state_dict(own.net.state_dict())
    partner.net.eval(), own.net.train(), own.key_net.train()
    probs, clean_prob = split
    clean = clean_prob.cpu() > 0.5
    batches_x, batches_u = batches(clean.nonzero()[:, 0], cfg.batch_size), []
    for step, rows_x in enumerate(batches_x):
        batches_u = batches_u or batches((~clean).nonzero()[:, 0], cfg.batch_size)
        rows_u = batches_u.pop()
        twice = images[torch.cat([rows_x, rows_x, rows_u, rows_u])]  # there are two views of each
        twice = twice.to(candidates.device, non_blocking=True)
        weak, strong = views.weak(twice), views.strong(twice)
        lam = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample().item()  # on the CPU
        lam = 1 if "mixup" in cfg.ablate else max(lam, 1 - lam)
        terms, updated = co_training_terms(
            own, partner.net, prototypes, weak, strong, candidates[rows_x], clean_prob[rows_x],
            probs[rows_x], lam, torch.randperm(len(twice)).to(twice.device),
            cfg.lambda_u * ramp_up(epoch + step / len(batches_x), cfg.warm_up),
            epoch > cfg.warm_up + cfg.start_contrastive, cfg)  # ">": as published
        prototypes.copy_(updated)
        yield own.step(terms)

TERMS = ["set", "entropy", "self", "prototype", "contrastive"]
COLUMNS = ["epoch", "phase", "lr", "loss", *TERMS, "clean", "test_acc_net1", "test_acc_net2",
           "test_acc", "seconds"]

def mean_terms(steps, epoch):
    """Means of the loss terms over an epoch's steps: the one moment that waits for the device."""
    steps = list(tqdm(steps, desc=f"epoch {epoch + 1}", unit="step", disable=None, leave=False))
    table = torch.stack([torch.stack([*terms.values()]) for terms in steps]).cpu()  # [steps, terms]
    for step, term in (~table.isfinite()).nonzero().tolist()[:1]:
        raise CoregError(f"stopped: the loss term {list(steps[0])[term]!r} is not finite in epoch "
                         f"{epoch + 1}, step {step + 1}; a smaller --lr may help", 1)
    return dict(zip(steps[0], table.mean(0).tolist()))

def make_learner(cfg, num_classes, device):
    """A new network with its state, on the device, in the precision and layout fastest there."""
    net = CoRegNet(num_classes, cfg.channels, cfg.image_size, cfg.width, cfg.embedding_dim)
    units = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not tell: then fp32
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and (units.get("avx512_bf16") or units.get("amx_bf16")))
    net.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and bool(fast))
    own = Learner(net.to(device, memory_format=torch.channels_last), cfg)
    if cfg.compile:
        own.net.compile(), own.key_net.compile()
    return own

def train(cfg, images, candidates, prior, figures, folder, device, state=None):
    """Train both networks -> (learners, views, one record per epoch, also kept in metrics.jsonl).
    images uint8 [N,C,S,S], anywhere; on `device`: candidates bool [N,K], or labels float [N,K];
    prior [K]. figures(nets, views, splits) gives what true labels tell: see evaluate(). state: a
    checkpoint to go on from, all that the rest depends on."""
    torch.manual_seed(cfg.seed)
    views = Views(cfg.views, *(value.to(device) for value in channel_statistics(images)))
    learners = [make_learner(cfg, candidates.shape[1], device) for _ in range(2)]
    prototypes = torch.zeros(candidates.shape[1], cfg.embedding_dim, device=device)
    records, saved, targets = [], None, digest(candidates.cpu().numpy())
    if state:
        expect(state["targets"] == targets, "--resume", f"the annotations that {folder} began with",
               "others; bring those back, or start another run")
        for own, its_state in zip(learners, state["learners"]):
            own.restore(its_state)
        prototypes, records = state["prototypes"].to(device), state["records"]
        torch.set_rng_state(state["random"])
    begin, save_every = len(records), cfg.save_every or (1 if cfg.epochs <= 100 else 10)
    print(" ".join(f"{name.removeprefix('test_'):>8.8}" for name in COLUMNS))
    try:
        for epoch in range(begin, cfg.epochs + 1):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(folder / "metrics.jsonl", lines.encode())
            saved = packed(torch.save, dict(  # bytes: an epoch that is cut off is forgotten whole
                config=dataclasses.asdict(cfg), targets=targets, records=records,
                prototypes=prototypes, random=torch.get_rng_state(),
                learners=[own.state() for own in learners]))
            if epoch == begin or epoch % save_every == 0:
                write_atomically(folder / "checkpoint.pt", saved)
            if epoch == cfg.epochs:
                return learners, views, records
            start, both, lr = time.time(), [], cosine_lr(epoch, cfg.lr, cfg.lr_period)
            phase = cfg.method if cfg.method != "co-reg" else (
                "warm-up" if epoch < cfg.warm_up else "co-train")
            splits = [] if phase != "co-train" else [
                split_data(own, images, views, candidates, prior, cfg) for own in learners]
            for i, own in enumerate(learners):
                own.optimizer.param_groups[0]["lr"] = lr
                other = i if "co-pl" in cfg.ablate else 1 - i
                steps = (co_training_epoch(own, learners[other], splits[other], prototypes, images,
                                           candidates, views, cfg, epoch) if splits else
                         warm_up_epoch(own, images, candidates, views, cfg))
                both.append(mean_terms(steps, epoch))
            terms = {name: sum(means.get(name, 0.0) for means in both) / 2 for name in TERMS}
            records.append(dict(
                epoch=epoch + 1, phase=phase, lr=lr, loss=sum(terms.values()), **terms,
                clean=sum(int((clean_prob > 0.5).sum()) for _, clean_prob in splits) / 2,
                **figures([own.net for own in learners], views, splits),
                seconds=round(time.time() - start, 2)))
            cells = (records[-1].get(name, "-") for name in COLUMNS)
            print(*(f"{c:8.4f}" if isinstance(c, float) else f"{c:>8}" for c in cells), flush=True)
    except OSError as error:
        raise CoregError(f"stopped: cannot write in {folder} ({error.strerror}); the checkpoint of "
                         f"before is good: make room, then --resume {folder}", 1) from error
    except KeyboardInterrupt:
        if saved:
            write_atomically(folder / "checkpoint.pt", saved)
        raise CoregError(f"interrupted; to go on: python coreg.py --resume {folder}", 130)

class Classifier:
    """model.pt of a run as a function: uint8 [N,C,S,S] -> probabilities [N,K] of class_names."""
    def __init__(self, path, device="cpu"):
        with advice(f"--model: {path} is missing, damaged or no model.pt of this version"):
            saved = torch.load(path, map_location=device, weights_only=True)
            self.class_names, self.shape = saved["class_names"], saved["shape"]
            self.views = Views("photo", saved["mean"], saved["std"])
            self.nets = [CoRegNet(*self.shape).to(device) for _ in saved["networks"]]
            for net, state in zip(self.nets, saved["networks"]):
                net.load_state_dict(state)

    def prepare(self, image):
        """PIL image -> uint8 [C,S,S]."""
        return to_square(image, self.shape[2], self.shape[1])

    def __call__(self, images):
        return (sum(predict(net, images, self.views.plain) for net in self.nets) / 2).softmax(1)

def predict_files(cfg):
    """--predict: label an image, or all below a folder, with --model, into predictions.csv."""
    source, classify = Path(cfg.predict), Classifier(cfg.model, pick_device(cfg.device))
    target = Path(cfg.output_dir or Path(cfg.model).parent) / "predictions.csv"
    expect(cfg.output_dir == "-" or cfg.overwrite or not target.exists(), "--output-dir",
           "another folder, or --overwrite", f"{target}, which exists")
    paths = [source] if source.is_file() else find_images(source)
    table, read = io.StringIO(newline=""), set()
    out = csv.writer(table, lineterminator="\n")
    out.writerow("path,label,confidence,label_2,confidence_2,label_3,confidence_3".split(","))
    prepare = partial(to_square, size=classify.shape[2], channels=classify.shape[1])
    for images, _, rows in load_batches(Files(paths), prepare, "predict", cfg.num_workers):
        for row, probs in zip(rows, classify(images).cpu() if rows else ()):
            best = zip(*probs.topk(min(3, len(probs))))
            pairs = ((classify.class_names[k], f"{share:.4f}") for share, k in best)
            out.writerow(sum(pairs, (paths[row],)))  # one long tuple
        read.update(rows)
    report_broken(paths, read)
    expect(read, "--predict", f"an image or a folder with images, as {source}", "none to read")
    if cfg.output_dir == "-":
        return print(table.getvalue(), end="")
    write_atomically(target, table.getvalue().encode())
    print(f"{len(read)} predictions: {target}")

def load_templates(cfg):
    """--templates: the name of a list, or a file with a template on each line."""
    templates = TEMPLATES.get(cfg.templates, read_lines(Path(cfg.templates)))
    if cfg.templates == "imagenet":
        import open_clip
        templates = [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]
    expect(templates and all(line.count("{}") == 1 == line.count("{") for line in templates),
           "--templates", f"one of {', '.join(TEMPLATES)}, or a file with one {{}} on each line",
           cfg.templates)
    expect(cfg.num_templates <= len(templates), "--num-templates", f"0 to {len(templates)}",
           cfg.num_templates)
    return templates[:cfg.num_templates or None]

def on_device(images, device):
    """There where they take at most a quarter of its free memory; else only batches cross."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * images.nbytes
    return images.to(device) if images.nbytes <= free / 4 else images

def choose_targets(cfg, candidates, shares, labels):
    """What --method learns from: sets bool [N,K], or labels float [N,K] for cross-entropy."""
    if cfg.method == "supervised":
        print("supervised: trains on the TRUE labels: an upper bound, not a result")
        return F.one_hot(labels, candidates.shape[1]).float()
    if cfg.method == "hard":  # where labels have equal shares, a random one of them
        chance = torch.rand(shares.shape, generator=torch.Generator().manual_seed(cfg.seed))
        return F.one_hot((shares + 1e-6 * chance).argmax(1), candidates.shape[1]).float()
    return shares if cfg.method == "distill" else candidates

def save_model(path, learners, views, class_names, cfg):
    """All that Classifier needs."""
    nets = [{name: value.cpu() for name, value in own.net.state_dict().items()} for own in learners]
    shape = [len(class_names), cfg.channels, cfg.image_size, cfg.width, cfg.embedding_dim]
    write_atomically(path, packed(torch.save, dict(
        networks=nets, class_names=class_names, mean=views.mean.cpu(), std=views.std.cpu(),
        shape=shape)))

def report(cfg, class_names, train_part, test_part, candidates, shares, test_probs, records, both):
    """From the annotator to the last epoch, as far as labels exist, and what changed on the way.
    The parts: of read_images(). both(images): mean logits [N,K] of the networks."""
    (images, labels, _, names), (test_images, test_labels, *_) = train_part, test_part
    table, annotated = {}, test_probs is not None and test_labels is not None
    if annotated:
        before = test_probs.float().mean(0)  # [N,K]
        table["zero-shot %, best single template*"] = max(
            accuracy(probs, test_labels) for probs in test_probs)
        table["zero-shot %, mean of templates"] = accuracy(before, test_labels)
    table["candidate sets with the true label* %"] = coverage(candidates, labels)
    table["candidate sets, mean size"] = candidates.float().sum(1).mean().item()
    if cfg.warm_up and cfg.method == "co-reg":
        table["test accuracy % after warm-up"] = records[cfg.warm_up - 1].get("test_acc")
    for name, key in {"network 1": "_net1", "network 2": "_net2", "both": ""}.items():
        table[f"test accuracy % at the end, {name}"] = records[-1].get("test_acc" + key)
    for name, value in table.items():
        if value is not None:
            print(f"{name:40} {value:6.2f}")
    if annotated:
        print("test accuracy % per class, mean of templates -> both networks:")
        scores = before, both(test_images)
        for k, name in enumerate(class_names):
            rows = test_labels == k
            if rows.any():
                old, new = (accuracy(part[rows], test_labels[rows]) for part in scores)
                print(f"{name:40.40} {old:6.2f} -> {new:6.2f}")
    if cfg.annotator != "flip":
        print("training images whose label changed most confidently, annotator -> both networks:")
        old, (confidence, new) = shares.argmax(1), both(images).softmax(1).max(1)
        for row in (confidence * (old != new)).argsort(descending=True)[:10].tolist():
            if old[row] != new[row]:
                print(f"{str(names[row]):40} {class_names[old[row]]} -> {class_names[new[row]]} "
                      f"({confidence[row]:.2f})")

def run(cfg):
    """Data -> annotation -> training -> the files of the run and a table."""
    if cfg.predict:
        return predict_files(cfg)
    cfg, folder, state = load_checkpoint(cfg) if cfg.resume else (cfg, choose_folder(cfg), None)
    device, templates = pick_device(cfg.device), load_templates(cfg)
    train_set, test_set, class_names = read_dataset(cfg)
    images, labels, train_set, _ = train_part = read_images(train_set, cfg, "read train")
    test_images, test_labels, test_set, _ = test_part = read_images(test_set, cfg, "read test")
    expect(len(images) > 1, f"--data-dir {cfg.data_dir}", "images", "none that can be read")
    with lock(folder):
        print(f"{cfg.dataset}: {len(images)} training and {len(test_images)} test images, "
              f"{len(class_names)} classes, on {device}; results go to {folder}")
        candidates, shares, test_probs = label_sets(
            cfg, [train_set, test_set], [images, test_images], labels, class_names, templates,
            device)
        targets = choose_targets(cfg, candidates, shares, labels)
        prior = shares.mean(0) if cfg.prior == "clip" else torch.ones(len(class_names))
        if not state:
            for name in ("checkpoint.pt", "metrics.jsonl", "model.pt"):
                (folder / name).unlink(missing_ok=True)
            config = json.dumps(dataclasses.asdict(cfg), indent=1)
            write_atomically(folder / "config.json", config.encode())
        figures = partial(evaluate, labels, test_labels, on_device(test_images, device), candidates)
        learners, views, records = train(
            cfg, on_device(images, device), targets.to(device), (prior / prior.sum()).to(device),
            figures, folder, device, state)
        save_model(folder / "model.pt", learners, views, class_names, cfg)
    def both(some): return sum(predict(own.net, some, views.plain).cpu() for own in learners) / 2
    report(cfg, class_names, train_part, test_part, candidates, shares, test_probs, records, both)
    print(f"(*: needs labels that training never sees)  The classifier: {folder / 'model.pt'}")

def main(argv=None):
    """Run the command line -> exit code: 0, 1 (not finite), 2 (bad input), 130 (interrupted)."""
    try:
        return run(parse(argv)) or 0
    except CoregError as error:
        message, code = (*error.args, 2)[:2]
    except OSError as error:  # reading has its own messages: this is writing
        message, code = (f"cannot write {error.filename} ({error.strerror}); make room, or name "
                         "another --output-dir or --data-dir"), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print("coreg.py:", " ".join(message.split()), file=sys.stderr)
    return code

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: save, then stop
    sys.exit(main())
