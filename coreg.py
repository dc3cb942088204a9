# SPDX-License-Identifier: MIT
"""Co-Reg: a small image classifier from unlabeled images and a vision-language model.
Digits, no human label: 97.0 +- 0.8 % (both networks, python coreg.py --seed 0 to 4; torch
2.14.1, 2 cores of an AMD EPYC, November 2026). Its annotator is right in 82 % of the images.

The method of "Pre-Trained Vision-Language Models as Partial Annotators" (arXiv 2406.18550,
AAAI 2025): CLIP's prompt templates give each image a set of candidate labels, perhaps wrong;
two networks clean the sets for each other. "Eq.": the AAAI text; "published code": only there.

    python coreg.py                       # handwritten digits, a tiny CLIP; no download
    python coreg.py --dataset cifar10     # the paper's setting, with OpenAI's CLIP ViT-B/32
    grep -n "^# (" coreg.py               # contents
"""
import argparse, contextlib, copy, dataclasses, hashlib, inspect, io, json, logging, math, os
import random, re, signal, sys, time, unicodedata, warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.datasets as tv
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch.utils.data import Subset
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm
# Shapes: N images, K classes, T templates, B batch, C channels, S side, V views, D embedding,
# Q queue, E epochs, A anchors, M all in a contrast. _w1 _w2: weak views, _s1 _s2: strong.

# (0) Settings --------------------------------------------------------------------------------
# A line is a field of Config, a flag of the command line, with the line as its help, and an
# entry of config.json. The defaults are the paper's CIFAR-10; others: DATASETS.
class CoregError(Exception):
    """Something that the user can mend: main() prints it as one line and returns 2."""
def expect(condition, name, expected, got):
    if not condition: raise CoregError(f"{name}: expected {expected}, got {got}")

@contextlib.contextmanager
def hint(message):  # whatever fails inside becomes one line that begins with this message
    try:
        yield
    except Exception as error:  # libraries raise many kinds of errors
        raise CoregError(f"{message} ({type(error).__name__}: {error})") from error

CHOICES = dict(annotator=["clip", "flip"], candidates=["multi_prompt", "argmax"], precision=[
    "auto", "bf16", "fp32"], ablate=["", "co-pl", "supcon", "prototype", "unlabeled"])
LEAST = dict(image_size=8, epochs=1, batch_size=2, width=1, temperature=0.01, queue_size=1)

@dataclasses.dataclass
class Config:  # all settings; CoregError names the flag of a bad one
    dataset: str = "cifar10"         # a row of DATASETS (no flag: digits); folder: your own
    data_dir: str = "data"           # where data sets lie or go, and cached annotations
    classes: str = ""                # for folder: cat,dog,...; then train/ holds no labels
    num_samples: int = 0             # train on a random subset of so many images; 0: on all
    image_size: int = 32             # side of the network's input in pixels
    annotator: str = "clip"          # flip: synthetic sets from TRUE labels, to study noise
    annotations: str = ""            # an .npz, probs [T,N,K] in read_dataset's order
    clip_model: str = "ViT-B-32-quickgelu"  # a model of open_clip; tiny: section 13
    clip_pretrained: str = "openai"  # open_clip's tag of its weights, or their file
    templates: str = "small"         # 27; imagenet: 80; digits; or a file, one {} per line
    candidates: str = "multi_prompt"  # every template's label; argmax: that of their mean
    partial_rate: float = 0.01       # for flip: chance q of a wrong label to join a set
    noise_rate: float = 0.1          # for flip: chance eta that the true label is missing
    epochs: int = 800                # in all
    warm_up: int = 50                # epochs on whole sets; more where they are large or noisy
    start_contrastive: int = 10      # the representation terms begin so many + 1 epochs later
    batch_size: int = 256            # clean images in a batch
    lr: float = 0.01                 # learning rate; lower it if a loss is not finite
    lr_period: int = 800             # epochs from lr to lr/1000; 0: as many as --epochs
    width: int = 64                  # channels of the ResNet's first stage; 16 suits a CPU
    temperature: float = 0.5         # sharpening T; 1 leaves labels soft
    lambda_u: float = 1.0            # weight of the squared error on unlabeled images
    proto_weight: float = 0.1        # weight of prototype alignment
    contrastive_weight: float = 0.1  # weight of the contrastive loss
    momentum: float = 0.999          # m of prototypes and key encoders, under 1
    queue_size: int = 8192           # keys Q in each queue; fewer than images
    ablate: str = ""                 # what to leave out; supcon: the clean flags of Eq. 11
    seed: int = 0                    # of networks, order, views and synthetic sets
    device: str = "auto"             # auto, cpu, cuda, cuda:N or mps
    precision: str = "auto"          # fp32, bf16; auto: bf16 on CUDA and AVX512-BF16
    output_dir: str = ""             # the run's folder; else runs/<dataset>-seed<seed>-<time>
    resume: str = ""                 # folder of a run to go on with; its settings hold
    def __post_init__(self):
        for name, allowed in dict(CHOICES, dataset=[*DATASETS]).items():
            expect(getattr(self, name) in allowed, flag(name), allowed, getattr(self, name))
        for name, value in vars(self).items():
            least = LEAST.get(name, 0)  # NaN is not above any number:
            good = isinstance(value, str) or least <= value < math.inf
            expect(good, flag(name), f"{least} or more", value)
        expect(self.momentum < 1, "--momentum", "under 1", self.momentum)
        expect(self.warm_up <= self.epochs, "--warm-up",
               f"at most --epochs {self.epochs} (set both)", self.warm_up)
def flag(name): return "--" + name.replace("_", "-")

# (1) Prompt templates and data sets ----------------------------------------------------------
# A prompt is a template filled with a class name. A data set is a sequence of pairs (PIL
# image, label), mostly from torchvision; the label -1 means that nobody knows it.
def phrases(text): return [" ".join(phrase.split()) for phrase in text.split(";")]
TEMPLATES = {"small": phrases("""a photo of a {}; a rendering of a {}; a cropped photo of the
    {}; the photo of a {}; a photo of a clean {}; a photo of a dirty {}; a dark photo of the
    {}; a photo of my {}; a photo of the cool {}; a close-up photo of a {}; a bright photo of
    the {}; a cropped photo of a {}; a photo of the {}; a good photo of the {}; a photo of one
    {}; a close-up photo of the {}; a rendition of the {}; a photo of the clean {}; a rendition
    of a {}; a photo of a nice {}; a good photo of a {}; a photo of the nice {}; a photo of the
    small {}; a photo of the weird {}; a photo of the large {}; a photo of a cool {}; a photo
    of a small {}"""),
    "digits": phrases("""a photo of the number {}.; a bold number {}.; a thin number {}.; a
    narrow number {}.; a wide number {}.; a slanted number {}.; a rotated number {}.; a wobbly
    number {}.; a pixelated number {}."""),  # all that TinyCLIP knows
    "imagenet": [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]}
DIGITS = phrases("zero; one; two; three; four; five; six; seven; eight; nine")
FACES = phrases("Angry; Disgust; Fear; Happy; Sad; Surprise; Neutral")
SIGNS = phrases("""Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60; Speed limit
    70; Speed limit 80; Speed limit 80 cancelled; Speed limit 100; Speed limit 120; No passing;
    No truck overtaking; Only have priority at the next intersection; Priority road; Give way;
    Stop; All vehicles prohibited; Trucks prohibited; No entry; Caution!; Curve (to the left);
    Curve (to the right); Continuous curves; Rough road; Slippery road; The road narrows on the
    right; Construction site; Signal light; Pay attention to pedestrians; Pay attention to
    children; Watch out for bikes; Watch out for snow/ice on the road; Deer ahead; Unlimited
    speed; Turn right; Turn left; Go straight; Go straight and turn right; Go straight and turn
    left; Drive on the right; Drive on the left; Driving around the island; Lift ban on no
    passing; Lift ban on truck overtaking""")

def read_digits(cfg):  # scikit-learn's 1,797 handwritten digits, 8x8 pixels of 0..16
    data = load_digits()
    images = [Image.fromarray((pixels * 255 / 16).astype(np.uint8)) for pixels in data.images]
    return list(zip(images, data.target.tolist())), None

def open_image(path):  # an image file -> PIL image, RGB, upright as its EXIF data say
    image = Image.open(path)
    expect(image.mode[0] not in "IF", "pixels", "of 8 bits", f"mode {image.mode}")
    with contextlib.suppress(Exception):  # damaged EXIF data: it stays as it is
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")
HIDDEN = (".", "__")  # how .ipynb_checkpoints and __MACOSX begin
def class_name(text): return unicodedata.normalize("NFC", text.strip())  # accents in one form

class Photos(tv.ImageFolder):
    """ImageFolder without hidden files and folders, naming what it cannot decode. class_names:
    None if folders name the classes; unlabeled: images at any depth, with the label -1."""
    def __init__(self, root, class_names, unlabeled=False):
        self.class_names, self.unlabeled = class_names, unlabeled
        super().__init__(root, None, None, open_image, self.is_photo, allow_empty=True)
    def find_classes(self, root):
        if self.unlabeled: return self.class_names, {"": -1}
        folders = [name for name in super().find_classes(root)[0]  # all, or it raises
                   if not name.startswith(HIDDEN)]
        names = self.class_names or sorted({class_name(folder) for folder in folders})
        return names, {folder: names.index(class_name(folder)) for folder in folders}
    def is_photo(self, path):
        *folders, name = Path(path).relative_to(self.root).parts
        hidden = name.startswith(".") or any(part.startswith(HIDDEN) for part in folders)
        try:
            return not hidden and open_image(path) is not None
        except Exception as error:  # a broken file raises nearly any kind
            print(f"left out: {path} ({error})", file=sys.stderr)
            return False

def read_photos(cfg):  # train/<class>/, or all of train/ with --classes; test/<class>/
    root, names = Path(cfg.data_dir), None
    if cfg.classes: names = [class_name(text) for text in cfg.classes.strip(",").split(",")]
    train = Photos(root / "train", names, unlabeled=bool(names))
    return train, Photos(root / "test", train.classes) if (root / "test").is_dir() else []
def both(reader, parts=("train", "test")):  # a data set of torchvision -> read(cfg)
    return lambda cfg: [reader(cfg.data_dir, part, download=True) for part in parts]
# read(cfg) -> training part, test part or None (hold out a fifth); class_names None: its own;
# channels 1: grey; views: for Views (square: least, most, grey); preset: of Config.
DatasetSpec = namedtuple("DatasetSpec", "read class_names channels views preset",
                         defaults=(None, 3, {}, {}))
IS_TRAIN, NO_FLIP, LARGE = (True, False), dict(flip=False), dict(epochs=100, image_size=64)
DATASETS = {
    "digits": DatasetSpec(  # fp32: so small a network is faster without bf16
        read_digits, DIGITS, 1, dict(flip=False, operations=False, square=(0, 1 / 3, 0.5)),
        dict(clip_model="tiny", templates="digits", image_size=8, width=16, epochs=15,
             warm_up=6, start_contrastive=3, batch_size=64, lr=0.05, lr_period=0,
             momentum=0.99, queue_size=1024, precision="fp32")),
    "folder": DatasetSpec(read_photos, preset=dict(epochs=100)),
    "cifar10": DatasetSpec(both(tv.CIFAR10, IS_TRAIN)),
    "cifar100": DatasetSpec(both(tv.CIFAR100, IS_TRAIN), preset=dict(warm_up=100)),
    "svhn": DatasetSpec(both(tv.SVHN), [f"number {i}" for i in range(10)], 3, NO_FLIP),
    "fmnist": DatasetSpec(both(tv.FashionMNIST, IS_TRAIN), None, 1,
                          dict(operations=False, square=(16 / 28, 16 / 28, 0.0)),
                          dict(epochs=100, image_size=28)),
    "eurosat": DatasetSpec(lambda cfg: (tv.EuroSAT(cfg.data_dir, download=True), None),
                           preset=LARGE),
    "fer2013": DatasetSpec(lambda cfg: (tv.FER2013(cfg.data_dir), None),
                           [f"{face} Facial Expression" for face in FACES], 1,
                           dict(operations=False, square=(16 / 64, 16 / 64, 0.0)), LARGE),
    "gtsrb": DatasetSpec(both(tv.GTSRB), [f"German Traffic Sign: {sign}" for sign in SIGNS], 3,
                         NO_FLIP, LARGE)}

def read_dataset(cfg):  # -> (training pairs, test pairs, class names)
    spec = DATASETS[cfg.dataset]
    with hint(f"--data-dir {cfg.data_dir}: expected {cfg.dataset} there, or a download"):
        train, test = spec.read(cfg)
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    if test is None:  # held out alike for every --seed
        count = round(0.8 * len(train))  # published code, for EuroSAT and FER2013
        test, rows = Subset(train, sorted(rows[count:])), rows[:count]
    rows = sorted(rows[:cfg.num_samples or None])
    expect(len(rows) > 1, f"--data-dir {cfg.data_dir}", "two or more images", len(rows))
    return Subset(train, rows), test, spec.class_names or train.classes

def to_pixels(image, cfg):  # PIL image -> uint8 [C,S,S]: a photo's centre, else squeezed
    image = image.convert("L" if DATASETS[cfg.dataset].channels == 1 else "RGB")
    if cfg.dataset == "folder": image = TF.center_crop(image, [min(image.size)])
    return TF.pil_to_tensor(TF.resize(image, [cfg.image_size, cfg.image_size]))

def load(pairs, transform, batch_size=256):  # batches of transformed images, labels
    with ThreadPoolExecutor() as pool:
        for rows in tqdm(torch.arange(len(pairs)).split(batch_size), "read", disable=None):
            images, labels = zip(*pool.map(pairs.__getitem__, rows.tolist()))
            yield torch.stack([*pool.map(transform, images)]), torch.tensor(labels)
def read_images(pairs, cfg):  # pairs -> (uint8 [N,C,S,S], labels int [N] or None: unknown)
    if not len(pairs): return None, None
    images, labels = zip(*load(pairs, lambda image: to_pixels(image, cfg)))
    images, labels = torch.cat(images), torch.cat(labels)
    return images, None if labels.min() < 0 else labels

# (2) CLIP annotation -> candidate sets -------------------------------------------------------
# "CLIP Annotated Partial Labels": template t and class k give the text feature u_tk, image i
# gives v_i; P[t,i,:] is the softmax over k of logit_scale * v_i . u_tk. The candidate set S_i
# is what the single templates answer: small where they agree, perhaps without the true label.
def candidate_sets(probs, mode="multi_prompt", top_k=5, ratio=0.5):
    """P [T,N,K] (rows of sum 1; zeros abstain) -> S bool [N,K]; an empty set becomes full.
    multi_prompt: S_i = {argmax_k P[t,i,k] : t = 1..T}. Of the mean over templates (published
    code): argmax; top_k largest; ratio: those of them with `ratio` times the largest."""
    if mode not in ("multi_prompt", "argmax", "top_k", "ratio"): raise ValueError(mode)
    mean_probs, num_classes = probs.mean(0, dtype=torch.float32), probs.shape[2]  # [N,K]
    sets = torch.zeros_like(mean_probs, dtype=torch.bool)  # [N,K]
    if mode == "multi_prompt":
        for template_probs in probs:
            answers = F.one_hot(template_probs.argmax(1), num_classes).bool()  # [N,K]
            sets |= answers & (template_probs > 0)
    else:
        count = 1 if mode == "argmax" else min(top_k, num_classes)
        values, classes = mean_probs.topk(count)  # [N,count], largest first
        least = ratio * values[:, :1] if mode == "ratio" else 0
        sets.scatter_(1, classes, (values > 0) & (values >= least))
    return sets | ~sets.any(1, keepdim=True)

def flip_candidates(labels, num_classes, partial_rate, noise_rate, generator=None):
    """True labels int [N], CPU -> synthetic S bool [N,K] (the paper's Table 3): a wrong label
    joins with chance partial_rate; with noise_rate one from outside replaces the truth."""
    size, true = (len(labels), num_classes), F.one_hot(labels, num_classes).bool()  # [N,K]
    sets = true | (torch.rand(size, generator=generator) < partial_rate)
    # The largest of random numbers is a uniform draw among the labels outside the set.
    outside = torch.rand(size, generator=generator).masked_fill(sets, -1).argmax(1)  # [N]
    swapped = (sets & ~true) | F.one_hot(outside, num_classes).bool()
    swap = torch.rand(len(labels), generator=generator) < noise_rate  # [N]
    return torch.where((swap & ~sets.all(1))[:, None], swapped, sets)  # full sets stay

def load_templates(name):  # the name of a list, or a text file, one a line -> list
    if name in TEMPLATES: return TEMPLATES[name]
    with hint(f"--templates {name}: expected {[*TEMPLATES]} or a file in UTF-8"):
        text = Path(name).read_text(encoding="utf-8-sig")  # -sig: without a byte-order mark
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        expect({line.count("{}") for line in lines} == {1}, "lines", "one {} each", lines)
    return lines

def load_clip(name, weights, device):  # -> (model, preprocessing of PIL images, tokenizer)
    if name == "tiny": return load_tiny_clip(device)
    tags = open_clip.list_pretrained_tags_by_model(name)
    with hint(f"--clip-model {name} --clip-pretrained {weights} did not load; expected a "
              f"model of open_clip, and a file of its weights or, to download, one of {tags}"):
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, weights, device=device, require_pretrained=True)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)

@torch.inference_mode()
def annotate(model, tokenizer, batches, class_names, templates, device):  # -> P [T,N,K]
    text_features, probs = [], []
    for template in templates:
        tokens = tokenizer([template.replace("{}", name) for name in class_names])
        text_features.append(model.encode_text(tokens.to(device), normalize=True))  # [K,D]
    for images, _ in batches:
        features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        logits = model.logit_scale.exp() * features @ torch.stack(text_features).mT  # [T,B,K]
        probs.append(logits.float().softmax(2).half().cpu())
    return torch.cat(probs, 1)

def read_probs(path, num_images, num_classes):  # `probs` of an .npz -> P float16 [T,N,K]
    with hint(f"{path} (if it is a cache, delete it)"):
        probs = torch.from_numpy(np.load(path)["probs"]).half()
        low, high, wanted = probs.min(), probs.max(), [len(probs), num_images, num_classes]
        expect([*probs.shape] == wanted and 0 <= low <= high <= 1, "probs [T,N,K]",
               f"{wanted} in 0..1", f"{[*probs.shape]} in {low}..{high}")
    return probs

def write_atomically(path, write):  # to a neighbour that is renamed: never half a file
    content, neighbour = io.BytesIO(), Path(f"{path}.{os.getpid()}.tmp")
    write(content)
    neighbour.write_bytes(content.getbuffer())
    neighbour.replace(path)
def digest(*parts): return hashlib.sha256(b"".join(parts)).hexdigest()[:12]  # bytes or arrays

def annotate_cached(cfg, pairs, images, class_names, device):
    """P float16 [T,N,K] of all pairs, from a cache or CLIP. DIFFERS: named after pixels, class
    names, templates, weights; the published cache can meet images of another split."""
    templates, weights = load_templates(cfg.templates), Path(cfg.clip_pretrained)
    recipe = json.dumps([cfg.clip_model, cfg.clip_pretrained, class_names, templates])
    key = digest(recipe.encode(), weights.read_bytes() if weights.is_file() else b"",
                 images.numpy())
    path = Path(cfg.data_dir) / "annotations" / f"{cfg.dataset}-{key}.npz"
    if path.exists(): return read_probs(path, len(images), len(class_names))
    model, preprocess, tokenizer = load_clip(cfg.clip_model, cfg.clip_pretrained, device)
    probs = annotate(model, tokenizer, load(pairs, preprocess), class_names, templates, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, probs=probs))
    except OSError as error:  # a read-only folder costs time, not the run
        print(f"warning: the annotations are not kept ({error})", file=sys.stderr)
    return probs

# (3) The weak/strong data set ----------------------------------------------------------------
# Images rest on the device as uint8. Views of whole batches [B,C,S,S] in [0,1]: weak = random
# crop and flip; strong = weak, a random operation, a cutout. All is published code. The CPU
# draws all random numbers: a seed gives the same views on every device.
def random_number(low, high): return low + (high - low) * torch.rand(()).item()
SHEAR = math.degrees(math.atan(0.3))
OPERATIONS = [  # those of RandAugment, in the published ranges; each draws its strength
    lambda x: x, TF.autocontrast, TF.equalize,
    v2.ColorJitter(brightness=(0.05, 0.95)), v2.ColorJitter(saturation=(0.05, 0.95)),
    v2.ColorJitter(contrast=(0.05, 0.95)),
    lambda x: TF.adjust_sharpness(x, random_number(0.05, 0.95)),
    lambda x: TF.posterize(x, int(random_number(4, 8))),  # 4..7 bits
    lambda x: TF.solarize(x, random_number(0, 1)),
    v2.RandomRotation(30),
    v2.RandomAffine(0, shear=(-SHEAR, SHEAR, 0, 0)),  # DIFFERS: published: about an edge
    v2.RandomAffine(0, shear=(0, 0, -SHEAR, SHEAR)),
    v2.RandomAffine(0, translate=(0.3, 0.0)),  # shares of a side
    v2.RandomAffine(0, translate=(0.0, 0.3))]

def random_operation(images):
    """One operation for each image. DIFFERS: images with the same one share its strength, so
    that torchvision's transforms serve; published: each its own."""
    choice, changed = torch.randint(len(OPERATIONS), (len(images),)), images.clone()
    for number, operation in enumerate(OPERATIONS):
        rows = (choice == number).nonzero()[:, 0].to(images.device)
        if len(rows): changed[rows] = operation(images[rows])
    return changed.clamp(0, 1)

def crop_and_flip(images, flip):
    """Each image shifted by up to 1/8 of its side (black comes in), half of them mirrored."""
    count, side, most = len(images), images.shape[-1], round(images.shape[-1] / 8)
    theta = torch.zeros(count, 2, 3)  # (x,y) in -1..1 shows theta (x,y,1)
    theta[:, 0, 0] = 1 - 2 * torch.randint(2 if flip else 1, (count,))  # 1 or -1
    theta[:, 1, 1] = 1
    theta[:, :, 2] = 2 / side * torch.randint(-most, most + 1, (count, 2))
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "nearest", align_corners=False)

def cutout(images, smallest, largest, fill):
    """A square at a random place of each image, its side between these shares of the image's.
    DIFFERS: 0.5 in colour; published: (125,123,114), shifted inward at two edges."""
    count, side = len(images), images.shape[-1]
    half, pixels = torch.empty(count, 1).uniform_(smallest, largest) / 2, torch.arange(side)
    in_rows = (pixels + 0.5 - side * torch.rand(count, 1)).abs() < side * half  # [B,S]
    in_columns = (pixels + 0.5 - side * torch.rand(count, 1)).abs() < side * half  # [B,S]
    inside = in_rows[:, :, None] & in_columns[:, None, :]  # [B,S,S]
    return images.masked_fill(inside[:, None].to(images.device), fill)

class Views:
    """uint8 batches [B,C,S,S] -> normalised float views. DIFFERS: by mean and deviation of the
    training images uint8 [N,C,S,S]; published: typed in for each data set."""
    def __init__(self, images, flip=True, operations=True, square=(0.0, 0.5, 0.5)):
        self.flip, self.operations, self.square = flip, operations, square
        sample = images[::1 + len(images) // 10_000] / 255  # 10,000 images tell enough
        self.mean = sample.mean((0, 2, 3), keepdim=True)  # [1,C,1,1]
        self.deviation = sample.std((0, 2, 3), keepdim=True).clamp_min(1 / 255)  # never 0
    def plain(self, images): return (images / 255 - self.mean) / self.deviation
    def weak(self, images):
        return (crop_and_flip(images / 255, self.flip) - self.mean) / self.deviation
    def strong(self, images):
        images = crop_and_flip(images / 255, self.flip)
        if self.operations: images = random_operation(images)
        return (cutout(images, *self.square) - self.mean) / self.deviation

# (4) Both networks ---------------------------------------------------------------------------
# Two pre-activation ResNet-18 with different random starts: a linear classifier f, a head with
# unit-norm output z, and, for section 9, a momentum copy (key encoder) and a queue of keys.
class PreActBlock(nn.Module):  # the shortcut, too, starts after the first BatchNorm and ReLU
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            # AvgPool2d strides, as oneDNN's strided 1x1 (torch 2.14) can write out of bounds.
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride),
                                          nn.Conv2d(in_channels, channels, 1, bias=False))
    def forward(self, x):
        x = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.shortcut(x)

class CoRegNet(nn.Module):
    """Images [B,C,S,S] -> (logits [B,K], embeddings z [B,D] of norm 1), for any S from 8."""
    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128,
                 bf16=False):
        super().__init__()
        self.bf16 = bf16  # DIFFERS: convolutions in bfloat16; published: float32
        layers, dim = [Conv2dNormActivation(in_channels, width)], width  # 3x3, BatchNorm, ReLU
        for channels in (width, 2 * width, 4 * width, 8 * width):
            stride = 1 if channels == width and image_size < 64 else 2  # halves the sides
            layers += [PreActBlock(dim, channels, stride), PreActBlock(channels, channels, 1)]
            dim = channels
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(dim, num_classes)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(),
                                  nn.Linear(dim, embedding_dim))
    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(images)  # [B,dim]
            logits, embeddings = self.fc(features), self.head(features)
        return logits.float(), F.normalize(embeddings.float())

EMBEDDING_DIM, SGD_MOMENTUM, SGD_DECAY = 128, 0.9, 5e-4  # published code; weight decay
class Learner:  # one of the two networks, with all the state that belongs to it
    def __init__(self, num_classes, cfg, device, bf16):
        channels = DATASETS[cfg.dataset].channels
        net = CoRegNet(num_classes, channels, cfg.image_size, cfg.width, EMBEDDING_DIM, bf16)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.key_net = copy.deepcopy(net)
        self.queue = MomentumQueue(cfg.queue_size, EMBEDDING_DIM).to(device)
        self.losses = []  # of the last epochs, [N] each: input of the mixture model
        self.split = None  # what split_data gave
        self.optimizer = torch.optim.SGD(net.parameters(), cfg.lr, SGD_MOMENTUM, 0, SGD_DECAY)
    def step(self, terms):  # one optimizer step on the sum of {name: scalar}
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

# (5) Warm-up ---------------------------------------------------------------------------------
# "Supervised Training": each network by itself learns, on strong views, that its candidate set
# as a whole should have probability 1; negative entropy keeps it from learning wrong sets.
def partial_cross_entropy(logits, candidates):
    """Eq. 1: mean of -log(sum_{k in S_i} p_ik + 1e-5) over rows with |S_i| < K, 0 if none
    (published code). logits [B,K] get the gradient; candidates S bool [B,K] -> scalar."""
    loss = -torch.log((logits.softmax(1) * candidates).sum(1) + 1e-5)  # [B]
    partial_rows = ~candidates.all(1)  # [B]
    return (loss * partial_rows).sum() / partial_rows.sum().clamp_min(1)
def negative_entropy(logits):
    """Eq. 2: mean_i sum_k p_ik log p_ik, at most 0. logits [B,K], with gradient -> scalar."""
    log_probs = logits.log_softmax(1)  # finite where p underflows
    return (log_probs.exp() * log_probs).sum(1).mean()
def random_batches(rows, batch_size):  # [n] -> shuffled parts, none of 1 row (BatchNorm)
    order = torch.randperm(len(rows)).to(rows.device)
    return [batch for batch in rows[order].split(batch_size) if len(batch) != 1]
def mean_terms(steps, epoch):  # [{name: scalar}] -> {name: finite mean}
    means = {}
    for name in steps[0]:
        means[name] = sum(terms[name] for terms in steps).item() / len(steps)
        expect(math.isfinite(means[name]), f"epoch {epoch + 1}, {name!r} loss", "a finite "
               "one (a smaller --lr may help; the last checkpoint is good)", means[name])
    return means

def warm_up_epoch(own, images, candidates, views, cfg, epoch):
    """Eq. 3, the sum of both, on every image once -> means of the loss terms."""
    own.net.train()
    rows, steps = torch.arange(len(images), device=images.device), []
    batches = random_batches(rows, 2 * cfg.batch_size)  # 2: published code
    for batch in tqdm(batches, "warm-up", disable=None, leave=False):
        logits, _ = own.net(views.strong(images[batch]))
        steps.append(own.step({"set": partial_cross_entropy(logits, candidates[batch]),
                               "entropy": negative_entropy(logits)}))
    return mean_terms(steps, epoch)

# (6) GMM split -------------------------------------------------------------------------------
# "Co-Pseudo-Labeling": before each later epoch both networks judge all sets. One with the true
# label is learnt early: its loss is small. Two Gaussians over the losses give w_i, the
# probability that set i is clean. Published code: alignment, scaling, averaging, all settings.
MIXTURE = dict(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4)
HISTORY_EPOCHS, CLEAN_THRESHOLD, MAX_LOSS = 5, 0.5, 88.0  # 88: about -log of float32's tiny
def align_distribution(probs, mean_probs, prior):
    """p [B,K], their mean over images [K], prior [K] -> [B,K]: normalise(p prior / mean)."""
    aligned = probs * prior / mean_probs.clamp_min(1e-8)  # 1e-8: a class never predicted
    return aligned / aligned.sum(1, keepdim=True)
def max_candidate_loss(probs, candidates):
    """Eq. 4: l_i = -log max_{k in S_i} p_ik, at most MAX_LOSS. p, S bool: [B,K] -> l [B]."""
    return -(probs * candidates).amax(1).log().clamp_min(-MAX_LOSS)

def clean_probability(loss_history, window=HISTORY_EPOCHS, seed=0):
    """Raw losses l [E,N], newest last -> w [N], the posterior of the component of lower mean:
    each epoch is scaled to 0..1, the last `window` averaged. Zeros if all losses are equal."""
    losses = loss_history[-window:].float().clamp_max(MAX_LOSS)
    low, high = losses.amin(1, keepdim=True), losses.amax(1, keepdim=True)  # [E,1]
    mean = ((losses - low) / (high - low).clamp_min(1e-12)).mean(0)  # [N]; 1e-12: constant
    if not mean.min() < mean.max(): return torch.zeros_like(mean)  # equal or NaN
    values = mean.cpu().numpy()[:, None]  # [N,1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten rounds without convergence are normal here
        mixture = GaussianMixture(random_state=seed, **MIXTURE).fit(values)
    posterior = mixture.predict_proba(values)[:, mixture.means_.argmin()]  # [N]
    return torch.from_numpy(posterior).to(mean)

@torch.no_grad()
def split_data(own, images, views, candidates, cfg):
    """Weak views -> (aligned probs [N,K], w [N]); appends to own.losses. DIFFERS: aligned with
    this pass's mean, not an older table; too few clean: the tenth of lowest loss."""
    probs = predict(own.net, images, views.weak).softmax(1)  # [N,K]
    probs = align_distribution(probs, probs.mean(0), 1 / probs.shape[1])  # uniform prior
    losses = max_candidate_loss(probs, candidates)  # [N]
    own.losses = [*own.losses, losses][-HISTORY_EPOCHS:]
    clean_prob = clean_probability(torch.stack(own.losses))
    count, tenth = int((clean_prob > CLEAN_THRESHOLD).sum()), max(2, -(-len(losses) // 10))
    if count < min(cfg.batch_size, tenth):
        print(f"split: only {count} sets are clean; the {tenth} of lowest loss count as clean")
        lowest = losses.topk(tenth, largest=False).indices
        clean_prob = torch.zeros_like(losses).index_fill(0, lowest, 1.0)
    return probs, clean_prob

# (7) Co-pseudo-labeling, sharpening, mixup ---------------------------------------------------
# A clean sample x keeps its set: its target joins the partner's prediction within the set,
# weighted w, with the own one, weighted 1-w. An unlabeled sample u takes the mean of both
# networks. Mixup, lambda ~ Beta(4,4) and the ramp: published code (MixMatch, DivideMix).
MIXUP_ALPHA, RAMP_EPOCHS = 4.0, 16
def sharpen(probs, temperature):
    """Eq. 7: normalise(p^(1/T)) [B,K], as softmax(log p / T); T under 1 makes labels surer."""
    return (probs.log() / temperature).softmax(1)

def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets of clean samples: r = partner_probs restricted to S bool (Eq. 5), then
    sharpen(w r + (1-w) o) (Eq. 6, 7). own_probs o: mean of weak views. w = clean_prob [B]."""
    inside = partner_probs.clamp_min(1e-12) * candidates  # 1e-12: where all underflow
    r, w = inside / inside.sum(1, keepdim=True), clean_prob[:, None]
    return sharpen(w * r + (1 - w) * own_probs, temperature)
def guess_labels(probs, temperature):
    """Targets [B,K] of unlabeled samples: sharpened mean of probs [V,B,K] (Eq. 6, 7)."""
    return sharpen(probs.mean(0), temperature)

def mixup(inputs, targets, lam, permutation):
    """lam * row + (1-lam) * permuted row of inputs [B,...] and targets [B,K]; lam: 0.5..1."""
    mixed_inputs = lam * inputs + (1 - lam) * inputs[permutation]
    return mixed_inputs, lam * targets + (1 - lam) * targets[permutation]
def ramp_up(epoch, warm_up, length=RAMP_EPOCHS):
    """From 0 at the end of the warm-up to 1 `length` epochs later; epoch may be a fraction."""
    return min(max((epoch - warm_up) / length, 0.0), 1.0)
def squared_error(probs, targets):
    """Mean over all of [B,K] (published code; the paper sums over classes); 0 if empty."""
    return ((probs - targets) ** 2).sum() / max(1, probs.numel())

def self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u):
    """Eq. 8: cross-entropy of clean x + weight_u * squared error of unlabeled u (B may be 0).
    Logits (with gradient), targets (rows of sum 1): [B,K] -> scalar."""
    loss_u = squared_error(logits_u.softmax(1), targets_u)
    return F.cross_entropy(logits_x, targets_x) + weight_u * loss_u

# (8) Prototype EMA alignment -----------------------------------------------------------------
# A prototype o_k is the moving average of embeddings of clean images of pseudo-class k. The
# softmax of z . o / tau is a second classifier, pulled to the same targets. Both nets share o.
PROTO_TEMPERATURE = 0.3  # tau, published code
def update_prototypes(prototypes, embeddings, classes, momentum):
    """Eq. 10: for each z of class k in turn o_k <- m o_k + (1-m) z; at once for all n of them
    m^n o_k + (1-m) sum_j m^(n-j) z_j. o [K,D], z [B,D], classes [B] -> new o, of norm 1."""
    hits = F.one_hot(classes, len(prototypes)).to(embeddings.dtype)  # [B,K]
    following = hits.sum(0) - hits.cumsum(0)  # [B,K]
    weights = (1 - momentum) * momentum ** following * hits  # [B,K]
    kept = momentum ** hits.sum(0)[:, None] * prototypes  # [K,D]
    return F.normalize(kept + weights.T @ embeddings)

def prototype_loss(similarity_x, targets_a_x, targets_b_x, similarity_u, targets_a_u,
                   targets_b_u, lam, temperature, weight_u=1.0):
    """Eq. 9 of mixed images, targets a (own) and b (mixed in); q = softmax(similarity / tau):
    lam KL(a || q) + (1-lam) KL(b || q) on clean rows, + weight_u times the like of squared
    errors on unlabeled rows. All [B,K] -> scalar; similarity z . o gets the gradient."""
    log_q = (similarity_x / temperature).log_softmax(1)
    loss_x = (lam * F.kl_div(log_q, targets_a_x, reduction="batchmean")
              + (1 - lam) * F.kl_div(log_q, targets_b_x, reduction="batchmean"))
    q_u = (similarity_u / temperature).softmax(1)
    loss_u = (lam * squared_error(q_u, targets_a_u)
              + (1 - lam) * squared_error(q_u, targets_b_u))
    return loss_x + weight_u * loss_u

# (9) MoCo queue, noisy supervised contrastive loss -------------------------------------------
# "Noisy Contrastive Learning": an anchor (query) is pulled to images of its pseudo-class, if
# both are clean, and always to its own key, the key encoder's view of the same image. A pair
# of one class that is not clean on both sides is neither positive nor negative.
CONTRASTIVE_TEMPERATURE = 0.07  # published code
class MomentumQueue(nn.Module):
    """The last Q = `size` keys [n,D], their classes int [n], clean flags bool [n], n <= Q.
    DIFFERS: starts empty (save it whole, not its state_dict); published: random numbers."""
    def __init__(self, size, dim):
        super().__init__()
        self.size = size
        self.register_buffer("keys", torch.zeros(0, dim))
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))
        self.register_buffer("clean", torch.zeros(0, dtype=torch.bool))
    def push(self, keys, classes, clean):  # new tensors: a graph with the old ones stays valid
        self.keys = torch.cat([self.keys, keys.detach().float()])[-self.size:]
        self.classes = torch.cat([self.classes, classes])[-self.size:]
        self.clean = torch.cat([self.clean, clean])[-self.size:]

def contrastive_masks(classes, clean, num_anchors):
    """Eq. 11: classes int, clean bool [M] of [A anchors, their A keys, queue] -> bool [A,M]:
    positives (same class and both clean; own key i + A) and ignored (same class, not both)."""
    same_class = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean  # [A,M]
    own_key = torch.zeros_like(same_class)
    own_key.diagonal(num_anchors).fill_(True)
    return (same_class & both_clean) | own_key, same_class & ~both_clean & ~own_key

def supcon_loss(features, positives, ignored, temperature):
    """Eq. 11: mean over anchors of the mean over positives of -log softmax of similarities.
    features [M,D] of norm 1, anchors first, get the gradient; bool [A,M] -> scalar. DIFFERS:
    ignored are -inf in a logsumexp; published: a difference of sums, perhaps negative."""
    features = features.float()
    logits = features[:len(positives)] @ features.T / temperature  # [A,M]
    itself = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    log_sum = logits.masked_fill(ignored | itself, -math.inf).logsumexp(1, True)  # [A,1]
    positives = positives & ~itself
    loss = (log_sum - logits).masked_fill(~positives, 0).sum(1)  # [A]
    return (loss / positives.sum(1).clamp_min(1)).mean()

# (10) Evaluation -----------------------------------------------------------------------------
# Prediction: the argmax of both networks' summed logits. *: needs labels of training images.
@torch.inference_mode()
def predict(net, images, view, batch_size=512):  # -> logits [N,K], in eval mode
    batches, device = images.split(batch_size), net.eval().fc.weight.device
    return torch.cat([net(view(batch.to(device)))[0] for batch in batches])

def accuracy(scores, labels):  # percent of rows [N,K] whose argmax is the label [N]
    return 100 * (scores.argmax(1).cpu() == labels).float().mean().item()
def coverage(candidates, labels):  # percent of sets bool [N,K] that hold the label [N]
    return 100 * candidates.gather(1, labels[:, None]).float().mean().item()

# (11) Training -------------------------------------------------------------------------------
# After the warm-up, in every epoch, both networks split the data; network 1 then trains on the
# split of network 2, and network 2 on that of network 1.
def co_training_step(own, partner_net, prototypes, weak, strong, candidates, clean_prob,
                     partner_probs, lam, permutation, weight_u, representation, cfg):
    """One batch of network `own` -> ({name: loss term}, new prototypes); moves own.key_net and
    own.queue. weak, strong: two views [B,C,S,S] each of clean (x) and unlabeled images (u, may
    be none); S, w, partner_probs: of the clean ones. weight_u: lambda_u times the ramp.
    representation: with Eq. 9 to 11? own trains; partner_net, if another, is in eval mode."""
    x_w1, x_w2, u_w1, u_w2 = weak
    x_s1, x_s2, u_s1, u_s2 = strong
    with torch.no_grad():
        # Labels of unlabeled samples: both networks on both weak views.
        targets_u = partner_probs[:0]
        if len(u_w1):
            logits_u = [own.net(u_w1)[0], own.net(u_w2)[0],
                        *partner_net(torch.cat([u_w1, u_w2]))[0].chunk(2)]
            targets_u = guess_labels(torch.stack(logits_u).softmax(2), cfg.temperature)

        # Labels of clean samples: the partner within the set, joined with the own network.
        logits_w1, embeddings_x = own.net(x_w1)
        own_probs = (logits_w1.softmax(1) + own.net(x_w2)[0].softmax(1)) / 2
        targets_x = refine_labels(own_probs, partner_probs, candidates, clean_prob,
                                  cfg.temperature)  # [B_x,K]

    # Mixup of all strong views. The first n rows count as clean, whatever is mixed into them.
    inputs, n = torch.cat([x_s1, x_s2, u_s1, u_s2]), 2 * len(x_s1)
    targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
    mixed_inputs, mixed_targets = mixup(inputs, targets, lam, permutation)

    # Self-training.
    logits, embeddings = own.net(mixed_inputs)
    terms = {"self": self_training_loss(logits[:n], mixed_targets[:n], logits[n:],
                                        mixed_targets[n:], weight_u)}
    if not representation:  # DIFFERS: the published code computes the rest, then drops it
        return terms, prototypes

    # Prototypes: new ones first, then alignment of the mixed images with them.
    if cfg.ablate != "prototype":
        classes_x = targets_x.argmax(1)
        prototypes = update_prototypes(prototypes, embeddings_x, classes_x, cfg.momentum)
        similarity, mixed_in = embeddings @ prototypes.T, targets[permutation]
        terms["prototype"] = cfg.proto_weight * prototype_loss(
            similarity[:n], targets[:n], mixed_in[:n], similarity[n:], targets[n:],
            mixed_in[n:], lam, PROTO_TEMPERATURE, cfg.lambda_u)  # no ramp, unlike Eq. 8

    # Contrast: queries from the first strong view, keys from the second, not mixed.
    _, queries = own.net(torch.cat([x_s1, u_s1]))
    with torch.no_grad():  # theta_key <- m theta_key + (1-m) theta
        for theta_key, theta in zip(own.key_net.parameters(), own.net.parameters()):
            theta_key.mul_(cfg.momentum).add_(theta, alpha=1 - cfg.momentum)
        _, keys = own.key_net(torch.cat([x_s2, u_s2]))
    classes = torch.cat([targets_x, targets_u]).argmax(1)
    clean = torch.arange(len(classes), device=classes.device) < len(x_s1)
    if cfg.ablate == "supcon": clean = torch.ones_like(clean)  # plain SupCon trusts all
    positives, ignored = contrastive_masks(
        torch.cat([classes, classes, own.queue.classes]),
        torch.cat([clean, clean, own.queue.clean]), len(queries))
    features = torch.cat([queries, keys, own.queue.keys])
    terms["contrastive"] = cfg.contrastive_weight * supcon_loss(
        features, positives, ignored, CONTRASTIVE_TEMPERATURE)
    own.queue.push(keys, classes, clean)
    return terms, prototypes

def co_train_epoch(own, partner, split, prototypes, images, candidates, views, cfg, epoch):
    """A pass over the partner's clean samples -> mean of each loss term, number of samples."""
    # Every epoch the key encoder begins as a copy (DIFFERS: of BatchNorm's buffers, too).
    own.key_net.load_state_dict(own.net.state_dict())
    partner.net.eval()
    own.net.train(), own.key_net.train()  # after it: with --ablate co-pl partner is own
    probs, clean_prob = split
    clean = clean_prob > CLEAN_THRESHOLD
    rows_x, rows_u = clean.nonzero()[:, 0], (~clean).nonzero()[:, 0]
    if cfg.ablate == "unlabeled" or len(rows_u) == 1: rows_u = rows_u[:0]  # BatchNorm: not 1
    representation = epoch > cfg.warm_up + cfg.start_contrastive  # ">": published code
    batches_x, batches_u, steps = random_batches(rows_x, cfg.batch_size), [], []
    for step, batch_x in enumerate(tqdm(batches_x, "co-train", disable=None, leave=False)):
        # Unlabeled samples: begun again when used up. Of no rows, split makes one empty batch.
        if not batches_u: batches_u = random_batches(rows_u, cfg.batch_size)
        batch_u = batches_u.pop()

        # Views: two weak and two strong ones of every image.
        batch = images[torch.cat([batch_x, batch_x, batch_u, batch_u])]
        sizes = [len(batch_x), len(batch_x), len(batch_u), len(batch_u)]
        weak, strong = views.weak(batch).split(sizes), views.strong(batch).split(sizes)

        # Mixup coefficient and permutation, drawn on the CPU.
        lam = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample().item()
        lam, permutation = max(lam, 1 - lam), torch.randperm(len(batch)).to(images.device)

        # Labels, mixup, self-training, prototypes, contrast; then the optimizer step.
        weight_u = cfg.lambda_u * ramp_up(epoch + step / len(batches_x), cfg.warm_up)
        terms, new_prototypes = co_training_step(
            own, partner.net, prototypes, weak, strong, candidates[batch_x],
            clean_prob[batch_x], probs[batch_x], lam, permutation, weight_u,
            representation, cfg)
        prototypes.copy_(new_prototypes)
        steps.append(own.step(terms))
    return {"clean": len(rows_x), **mean_terms(steps, epoch)}

def cosine_lr(epoch, lr, period):  # from lr to lr/1000 at `period` (published code)
    return lr / 1000 + (lr - lr / 1000) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2

TERMS = ["set", "entropy", "self", "prototype", "contrastive"]
def train(state, images, candidates, test_images, test_labels, cfg, save):  # epochs left
    net_1, net_2, views = state.net_1, state.net_2, state.views
    partner_1, partner_2 = (net_1, net_2) if cfg.ablate == "co-pl" else (net_2, net_1)
    data = state.prototypes, images, candidates, views, cfg
    print("epoch     phase       lr     loss  clean  seconds  (test %: net 1, net 2, both)")
    for epoch in range(len(state.records), cfg.epochs):
        start, lr = time.time(), cosine_lr(epoch, cfg.lr, cfg.lr_period or cfg.epochs)
        net_1.optimizer.param_groups[0]["lr"] = net_2.optimizer.param_groups[0]["lr"] = lr
        if epoch < cfg.warm_up:
            terms_1 = warm_up_epoch(net_1, images, candidates, views, cfg, epoch)
            terms_2 = warm_up_epoch(net_2, images, candidates, views, cfg, epoch)
        else:
            net_1.split = split_data(net_1, images, views, candidates, cfg)
            net_2.split = split_data(net_2, images, views, candidates, cfg)
            terms_1 = co_train_epoch(net_1, partner_1, partner_1.split, *data, epoch)
            terms_2 = co_train_epoch(net_2, partner_2, partner_2.split, *data, epoch)
        phase = "warm-up" if epoch < cfg.warm_up else "co-train"
        record = dict(epoch=epoch + 1, phase=phase, lr=lr)
        for name in (*TERMS, "clean"):
            record[name] = (terms_1.get(name, 0.0) + terms_2.get(name, 0.0)) / 2
        record["loss"] = sum(record[name] for name in TERMS)
        if test_labels is not None:
            logits_1 = predict(net_1.net, test_images, views.plain)
            logits_2 = predict(net_2.net, test_images, views.plain)
            record.update(test_acc_net1=accuracy(logits_1, test_labels),
                          test_acc_net2=accuracy(logits_2, test_labels),
                          test_acc=accuracy(logits_1 + logits_2, test_labels))
        record["seconds"] = round(time.time() - start, 2)
        state.records.append(record)
        save()
        right = [f"{record[name]:6.1f}" for name in record if name.startswith("test_acc")]
        print(f"{epoch + 1:5} {phase:>9} {lr:8.5f} {record['loss']:8.4f} "
              f"{record['clean']:6.0f} {record['seconds']:8.1f}", *right, flush=True)

# (12) The run: files, command line -----------------------------------------------------------
# A run's folder: config.json, metrics.jsonl (a record an epoch), checkpoint.pt (all state).
def pick_device(cfg):  # -> (torch.device, do the networks compute in bfloat16?)
    name = cfg.device
    if name == "auto": name = "cuda" if torch.cuda.is_available() else "cpu"
    with hint(f"--device {name}: expected auto, cpu, or a cuda, cuda:N or mps that is here"):
        torch.zeros(1, device=name).item()
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for these sizes
    fast = "cuda" in name or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    return torch.device(name), {"bf16": True, "fp32": False, "auto": bool(fast)}[cfg.precision]

def parse(argv=None):  # command line -> Config; the rest: DATASETS, or the run to resume
    def fail(message): raise CoregError(f"{message}; see python coreg.py --help")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = fail
    helps = dict(re.findall(r"(?m)^    (\w+): (.+)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        parser.add_argument(flag(field.name), type=field.type, help=helps[field.name])
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        with hint(f"--resume {given['resume']}: expected a run's folder, with config.json"):
            base = vars(Config(**json.loads(Path(given["resume"], "config.json").read_text())))
        fixed = given.keys() & {"width", "queue_size", "precision", "seed", "output_dir"}
        expect(not fixed, "--resume", "no flag that its checkpoint fixes", fixed)
    else:
        dataset = given.setdefault("dataset", "digits")
        base = DATASETS.get(dataset, DATASETS["cifar10"]).preset
    return Config(**{**base, **given})

def label_sets(cfg, pairs, images, labels, class_names, device):  # -> S bool [N,K]
    if cfg.annotator == "flip":
        expect(labels is not None, "--annotator flip", "labels of the training images", "none")
        sets = flip_candidates(labels, len(class_names), cfg.partial_rate, cfg.noise_rate,
                               torch.Generator().manual_seed(cfg.seed))
    else:
        if cfg.annotations: probs = read_probs(cfg.annotations, len(images), len(class_names))
        else: probs = annotate_cached(cfg, pairs, images, class_names, device)
        sets = candidate_sets(probs, cfg.candidates)
        if labels is not None:
            right = accuracy(probs.mean(0, dtype=torch.float32), labels)
            print(f"the annotator's mean over templates is right in {right:.2f} %*")
    print(f"candidate sets: {sets.float().sum(1).mean():.2f} labels on average")
    if labels is not None: print(f"sets without truth*: {100 - coverage(sets, labels):.2f} %")
    return sets

def run(cfg):  # data -> annotation -> training -> the files of the run
    name = time.strftime(f"runs/{cfg.dataset}-seed{cfg.seed}-%Y%m%d-%H%M%S")
    folder, (device, bf16) = Path(cfg.resume or cfg.output_dir or name), pick_device(cfg)
    usable = cfg.resume or not (folder / "config.json").exists()
    expect(usable, "--output-dir", "a folder without a run", f"{folder}; or --resume it")
    pairs, test_pairs, class_names = read_dataset(cfg)
    images, labels = read_images(pairs, cfg)
    test_images, test_labels = read_images(test_pairs, cfg)
    print(f"{cfg.dataset}: {len(pairs)} training and {len(test_pairs)} test images, "
          f"{len(class_names)} classes, on {device}; results go to {folder}")
    candidates = label_sets(cfg, pairs, images, labels, class_names, device)
    data_digest = digest(json.dumps(class_names).encode(), images.numpy(), candidates.numpy())
    images, candidates = images.to(device), candidates.to(device)
    torch.manual_seed(cfg.seed)
    net_1, net_2 = [Learner(len(class_names), cfg, device, bf16) for _ in range(2)]
    state = argparse.Namespace(  # all that training changes, and what prediction needs
        prototypes=torch.zeros(len(class_names), EMBEDDING_DIM, device=device), net_1=net_1,
        net_2=net_2, records=[], views=Views(images, **DATASETS[cfg.dataset].views),
        class_names=class_names, cfg=cfg)
    if cfg.resume:
        with hint(f"--resume: {folder}/checkpoint.pt is missing, damaged or of other data"):
            saved = torch.load(folder / "checkpoint.pt", device, weights_only=False)
            expect(saved["data_digest"] == data_digest, "images, class names, annotations",
                   "those that the run began with", "others")
            torch.set_rng_state(saved["random"].cpu())
            state = saved["state"]
            state.cfg = cfg
    def save():
        lines = "".join(json.dumps(record) + "\n" for record in state.records)
        write_atomically(folder / "metrics.jsonl", lambda file: file.write(lines.encode()))
        saved = dict(state=state, data_digest=data_digest, random=torch.get_rng_state())
        write_atomically(folder / "checkpoint.pt", lambda file: torch.save(saved, file))
    folder.mkdir(parents=True, exist_ok=folder != Path(name))  # a run of the same second
    settings = json.dumps(vars(cfg), indent=1).encode()
    write_atomically(folder / "config.json", lambda file: file.write(settings))
    save()
    train(state, images, candidates, test_images, test_labels, cfg, save)

def main(argv=None):  # -> exit code: 0, 2 (what the user can mend), 130
    logging.disable(logging.ERROR)  # open_clip logs before it raises; one line is enough
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted; a run that had begun goes on with --resume", 130
    except (CoregError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        message, code = str(error), 2
    print("coreg.py:", " ".join(message.split()), file=sys.stderr)
    return code

# (13) Appendix: TinyCLIP ---------------------------------------------------------------------
# The annotator of the digits: open_clip's own CLIP, tiny, trained on digits drawn in Pillow's
# two fonts, with true captions. It never saw handwriting: it errs, and its templates disagree.
TINY_STEPS, TINY_BATCH, TINY_DRAWINGS = 300, 128, 6_000
def draw_digit(digit, rng):  # -> (PIL image 8x8, truths [T]: which templates describe it)
    stroke, pixelated, stretch = rng.choice([0, 1, 2]), rng.random() < 0.5, rng.uniform(0.5, 1)
    degrees, slant, wobble = rng.uniform(-15, 15), rng.uniform(-22, 22), rng.uniform(0, 0.15)
    font = ImageFont.load_default_imagefont() if pixelated else ImageFont.load_default(30)
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((20, 12), str(digit), 255, font, stroke_width=stroke)
    image = image.crop(image.getbbox()).resize((round(40 * stretch), 40))
    image = TF.affine(TF.center_crop(image, [64]), degrees, [0, 0], 1.0, [slant, 0.0])
    bend = F.interpolate(torch.randn(1, 2, 4, 4), size=(64, 64), mode="bicubic")
    image = TF.elastic(image, wobble * bend.permute(0, 2, 3, 1))
    image = ImageOps.pad(image.crop(image.getbbox()), (8, 8), Image.Resampling.BOX)
    return image, [True, stroke == 2, stroke == 0, stretch < 0.6, stretch > 0.9,
                   abs(slant) > 14, abs(degrees) > 10, wobble > 0.11, pixelated]

def load_tiny_clip(device):  # pre-trained now -> (model, preprocessing, tokenizer)
    torch.manual_seed(0)
    model = open_clip.CLIP(
        64, dict(image_size=8, patch_size=8, layers=1, width=8, head_width=8),
        dict(context_length=12, vocab_size=49408, width=32, heads=2, layers=1))
    model.visual = nn.Sequential(  # in place of the transformer: convolutions suit 8x8 pixels
        Conv2dNormActivation(1, 24), Conv2dNormActivation(24, 48, stride=2),
        Conv2dNormActivation(48, 96, stride=2), nn.Flatten(), nn.Dropout(), nn.Linear(384, 64))
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    tokens = tokenizer([template.replace("{}", digit) for template in TEMPLATES["digits"]
                        for digit in DIGITS])  # [T*10, length]
    rng, digits = random.Random(0), torch.arange(TINY_DRAWINGS) % 10
    drawings, truths = zip(*[draw_digit(digit, rng) for digit in digits.tolist()])
    preprocess = lambda image: TF.pil_to_tensor(image.convert("L").resize((8, 8))) / 127.5 - 1
    drawings = torch.stack([preprocess(image) for image in drawings])  # [n,1,8,8]
    truths = torch.tensor(truths).float()  # [n,T]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, TINY_STEPS)
    for _ in range(TINY_STEPS):
        batch = torch.randint(TINY_DRAWINGS, (TINY_BATCH,))
        captions = 10 * truths[batch].multinomial(1)[:, 0] + digits[batch]  # [B], true ones
        v = model.encode_image(drawings[batch], normalize=True)  # [B,D]
        u = model.encode_text(tokens, normalize=True)[captions]  # [B,D]
        logits, answers = model.logit_scale.exp() * v @ u.T, torch.arange(TINY_BATCH)
        loss = F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().to(device), preprocess, tokenizer

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # terminals that are not UTF-8
    if os.name == "posix": signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # coreg.py | head
    import coreg  # checkpoints then name the classes of coreg, not those of __main__
    sys.exit(coreg.main())
