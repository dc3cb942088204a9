# SPDX-License-Identifier: MIT
"""Co-Reg: a small image classifier from unlabeled images and a vision-language model.

CLIP labels every image once per prompt template. These answers form the image's candidate
set; a set is clean if it contains the true label. Two networks find the clean sets for each
other and learn from them: the method of "Pre-Trained Vision-Language Models as Noisy Partial
Annotators" (AAAI 2025; arXiv 2406.18550).

    python coreg.py                    # handwritten digits; a toy takes CLIP's place
    python coreg.py --dataset cifar10  # the paper's setting, with OpenAI's CLIP ViT-B/32

Sections 1 to 11 are the method, 12 to 15 the tool around it. Contents: grep "^# (" coreg.py
Marks: "Eq. 5" and headings in quotes are the AAAI paper's; "published code" is what only the
authors' code has (github.com/Portugas0807/Co-Reg); "DIFFERS" is a departure from that code.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import TarError
from zipfile import BadZipFile

import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

# Shapes: N images, K classes, T prompt templates, B a batch, n any number of rows, V
# predictions, C channels, H side of an image, D embedding, E epochs; A and M in section 9.
# Endings: _x clean samples, _u the others ("unlabeled"), _w1 _w2 weak, _s1 _s2 strong views.

# (0) Settings ------------------------------------------------------------------------------
# A setting is a flag of the command line, and cfg.NAME in the code. The defaults are those of
# CIFAR-10; PRESETS in section 12 names the data sets, with what differs for each.

class UserError(Exception):
    """A mistake that the user can mend: main() prints it in one line and returns 2."""

def between(kind, low, high=1e9):
    """A type for argparse: int or float, low to high."""

    def number(text):  # argparse shows this name: "invalid number value".
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high:g}, got {text}")
        return value

    return number

def add_settings(parser):
    """Adds all flags but --help to an argparse parser."""

    def flag(name, value, kind, text, **kw):
        parser.add_argument(name, default=value, type=kind, help=f"{text} (%(default)s)", **kw)

    path = os.path.expanduser  # replaces a leading "~"
    parts = "co-pl supcon prototype unlabeled mixup alignment split".split()
    flag("--dataset", "digits", str, "folder: your own photos", choices=PRESETS)
    flag("--data-dir", "data", path, "where data sets lie or are downloaded to")
    flag("--classes", None, str, "of a folder: cat,dog,...; its train/ is then unlabeled")
    flag("--num-samples", None, between(int, 2), "train on a random subset of N images")
    flag("--image-size", 32, between(int, 8), "side in pixels of what the networks see")
    flag("--channels", 3, int, "1: grey, 3: colour", choices=[1, 3])
    flag("--cutout", [0, 0.5], between(float, 0, 1), "blank square's side: from, to", nargs=2)
    flag("--annotations", None, path, "a CSV file of answers, with columns path and label")
    flag("--synthetic", None, between(float, 0, 1), "sets made of TRUE labels: a wrong label"
         " joins with chance Q; then, with chance ETA, one replaces the true label", nargs=2,
         metavar=("Q", "ETA"))
    flag("--clip-model", "ViT-B-32-quickgelu", str, "a model of open_clip; or tiny")
    flag("--clip-pretrained", "openai", str, "open_clip's tag of the weights, or a file")
    flag("--templates", "small", str, "small, digits, or prompts: 'a {}; the {}'")
    flag("--epochs", 800, between(int, 1), "in all; if not given, more for up to 120 images")
    flag("--warm-up", 50, between(int, 0), "epochs before the split; raise it for noisy sets")
    flag("--start-contrastive", 10, between(int, 0), "prototypes and contrast join in epoch"
         " START_CONTRASTIVE + 2 of co-training")
    flag("--batch-size", 256, between(int, 2), "clean images in a batch; if it is not given,"
         " at most a twentieth of all images, but 8 or more")
    flag("--lr", 0.01, between(float, 0), "learning rate; lower it if the loss is not finite")
    flag("--lr-period", 800, between(int, 0), "epochs in which lr falls along a cosine: 800"
         " even for 100 epochs, as published; 0: all epochs (a resume with more raises lr)")
    flag("--width", 64, between(int, 1), "channels of the ResNet; 16 suits a CPU")
    flag("--temperature", 0.5, between(float, 0.01), "below 1 makes new labels surer")
    flag("--lambda-u", 1.0, between(float, 0), "weight of unlabeled images")
    flag("--proto-weight", 0.1, between(float, 0), "weight of the prototypes' loss")
    flag("--contrastive-weight", 0.1, between(float, 0), "weight of the contrastive loss")
    flag("--momentum", 0.999, between(float, 0, 0.9999), "of prototypes and key encoders")
    flag("--queue-size", 8192, between(int, 1), "keys in each queue")
    flag("--ablate", [], str, "parts to leave out. split: all sets count as clean; co-pl: a"
         " network is its own partner; supcon: in the contrast all samples count as clean;"
         " prototype: Eq. 9; unlabeled: images whose sets are not clean; mixup; alignment: of"
         " the classes' shares in predictions", choices=parts, nargs="*")
    flag("--seed", 0, between(int, 0), "of networks, order, views, mixup, synthetic sets")
    flag("--device", "cuda" if torch.cuda.is_available() else "cpu", str, "or mps, cuda:N")
    flag("--precision", "auto", str, "auto: bf16 if fast", choices=["auto", "bf16", "fp32"])
    flag("--output-dir", None, path, "the run's folder; else runs/DATASET-seedN-DATE-TIME")
    flag("--resume", None, path, "folder of a run to go on with; on the device given now")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True,
                        help="mirror half of the views; not for text, digits (%(default)s)")
    parser.add_argument("--balance", action=argparse.BooleanOptionalAction, default=False,
                        help="if classes get lost: count the same share of each class as"
                        " clean; not in the paper (%(default)s)")

# (1) Prompt templates ----------------------------------------------------------------------
# A prompt is a template whose {} is filled with a class name. Templates that describe the same
# class in unlike words make CLIP answer unlike where it is unsure.

def phrases(text):
    """'a; b' -> ['a', 'b']. Line breaks and indents become single blanks."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]

TEMPLATES = {
    "small": phrases("""a photo of a {}; a rendering of a {}; a cropped photo of the {};
        the photo of a {}; a photo of a clean {}; a photo of a dirty {};
        a dark photo of the {}; a photo of my {}; a photo of the cool {};
        a close-up photo of a {}; a bright photo of the {}; a cropped photo of a {};
        a photo of the {}; a good photo of the {}; a photo of one {};
        a close-up photo of the {}; a rendition of the {}; a photo of the clean {};
        a rendition of a {}; a photo of a nice {}; a good photo of a {};
        a photo of the nice {}; a photo of the small {}; a photo of the weird {};
        a photo of the large {}; a photo of a cool {}; a photo of a small {}"""),
    "digits": phrases("""a plain number {}; a narrow number {}; a wide number {};
        a slanted number {}; a printed number {}"""),
}

# (2) CLIP annotation -> candidate sets -----------------------------------------------------
# "CLIP Annotated Partial Labels": template t and class k give the text feature u_tk, image i
# gives the image feature v_i, and P[t,i,:] is the softmax over k of logit_scale * v_i . u_tk.
# The candidate set S_i holds the answers of the single templates: small where they agree.

def load_clip(name, weights, device):
    """open_clip's names of model and weights -> model, preprocessing of images, tokenizer."""
    if name == "tiny":
        return TinyCLIP(), tiny_pixels, draw  # the toy of section 15
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, weights, device=device, require_pretrained=True)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and downloads raise nearly any kind of error.
        raise UserError(f"--clip-model {name} --clip-pretrained {weights}: {error}") from error

def candidate_sets(probs):
    """P [T,N,K], no NaN -> candidate sets S_i = {argmax_k P[t,i,k] : t = 1..T}, bool [N,K]."""
    candidates = torch.zeros_like(probs[0], dtype=torch.bool)
    return candidates.scatter(1, probs.argmax(2).T, True)

@torch.no_grad()
def annotate(clip, pairs, class_names, templates, device):
    """Asks CLIP about images -> mean of P over the templates [N,K], candidate sets bool [N,K].

    clip: load_clip()'s; pairs: (image, label), whose label is not used. P is large, and lives
    for one batch. DIFFERS: float32; published, on a GPU: float16."""
    model, preprocess, tokenizer = clip
    text_features = []
    for template in templates:
        tokens = tokenizer([template.replace("{}", name) for name in class_names])
        # Names may differ in capitals alone, or after 77 tokens, where CLIP cuts them off.
        if len(tokens.unique(dim=0)) < len(class_names):
            raise UserError(f"CLIP reads {template!r} alike for two of {class_names}: rename")
        text_features.append(model.encode_text(tokens.to(device), normalize=True))  # [K,D]
    text_features = torch.stack(text_features)  # [T,K,D]

    means = []
    sets = []
    for _, images, _ in load(pairs, preprocess):  # load() stands in section 12.
        image_features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        similarity = image_features @ text_features.mT  # [T,B,K]
        probs = (model.logit_scale.exp() * similarity).float().softmax(2)
        means.append(probs.mean(0).cpu())
        sets.append(candidate_sets(probs).cpu())
    if sum(map(len, sets)) < len(pairs):  # Later sets would move to other images.
        raise UserError("an image that was read before cannot be read now: mend or remove it")
    return torch.cat(means), torch.cat(sets)

def flip_candidates(labels, num_classes, partial_rate, noise_rate, generator=None):
    """True labels int64 [N], on the CPU -> synthetic sets, bool [N,K] (the paper's Table 3).
    A wrong label joins with chance partial_rate. Then, with chance noise_rate, a label drawn
    from outside the set takes the true label's place; a full set stays as it is."""
    joins = torch.rand(len(labels), num_classes, generator=generator) < partial_rate
    candidates = joins | F.one_hot(labels, num_classes).bool()
    noisy = torch.rand(len(labels), generator=generator) < noise_rate  # [N]
    rows = (noisy & ~candidates.all(1)).nonzero().flatten()
    outside = (~candidates[rows]).float()  # [n,K], weights of the draw
    new_labels = outside.multinomial(1, generator=generator).flatten()
    candidates[rows, labels[rows]] = False
    candidates[rows, new_labels] = True
    return candidates

# (3) The weak/strong data set --------------------------------------------------------------
# Views of a whole batch are made at once, on the device: weak, a random crop, mirrored or not;
# strong, that with one of RandAugment's operations (on colour images) and a cutout. All random
# numbers come from the CPU's generator, so that a resumed run on a CPU goes on exactly.

def crop_and_mirror(images, mirror):
    """Shifts images [B,C,H,H] by up to 1/8 of the side, black beyond; mirrors half of them."""
    count, _, side, _ = images.shape
    pad = round(side / 8)
    # A view is a window of H rows and H columns of the padded image.
    pixels = torch.arange(side)
    row = torch.randint(2 * pad + 1, (count, 1)) + pixels  # [B,H]
    column = torch.randint(2 * pad + 1, (count, 1)) + pixels  # [B,H]
    if mirror:
        column = torch.where(torch.rand(count, 1) < 0.5, column.flip(1), column)
    image = torch.arange(count)[:, None, None]
    padded = F.pad(images, [pad] * 4)
    # Picked axes come first: [B,H,H,C]; then [B,C,H,H].
    return padded[image, :, row[..., None], column[:, None]].movedim(3, 1)

def random_operation(images):
    """One of RandAugment's 14 operations for each 16th part of a batch, uint8 [B,3,H,H]. An
    image's two strong views draw apart, unless clean or other images are few in the batch.
    DIFFERS: torchvision's ranges; in the published code each image draws its operation."""
    changed = []
    for part in images.chunk(16):
        magnitude = torch.randint(31, ()).item()  # torchvision counts strength from 0 to 30.
        changed.append(v2.RandAugment(num_ops=1, magnitude=magnitude)(part))
    return torch.cat(changed)

def cutout(images, smallest, largest):
    """Sets a square anywhere in normalised images [B,C,H,H] to 0, the mean of all pixels. Its
    side is smallest to largest times the image's; it may reach over the edge. DIFFERS: 0; the
    published fixed colour ruins training on dark pictures."""
    count, _, side, _ = images.shape
    half = side / 2 * (smallest + (largest - smallest) * torch.rand(count, 1))  # [B,1]
    row = side * torch.rand(count, 1)  # of the square's centre, [B,1]
    column = side * torch.rand(count, 1)
    pixels = torch.arange(side) + 0.5  # [H], centres of pixels
    in_rows = (pixels - row).abs() < half  # [B,H]
    in_columns = (pixels - column).abs() < half  # [B,H]
    inside = in_rows[:, None, :, None] & in_columns[:, None, None]  # [B,1,H,H]
    return images.masked_fill(inside.to(images.device), 0)

class WeakStrongImages:
    """Training images uint8 [N,C,H,H], sets bool [N,K]. Rows int [B] -> weak or strong views,
    float [B,C,H,H]. DIFFERS: mean and deviation are measured: users bring their own images."""

    def __init__(self, images, candidates, cfg):
        self.images = images
        self.candidates = candidates
        self.cfg = cfg
        sample = images[:: 1 + len(images) // 1000] / 255  # up to 1,000 of them, for memory
        self.mean = sample.mean((0, 2, 3), keepdim=True)  # [1,C,1,1]
        self.std = sample.std((0, 2, 3), keepdim=True).clamp_min(1 / 255)  # never 0

    def weak(self, rows):
        images = crop_and_mirror(self.images[rows], self.cfg.mirror)
        return (images / 255 - self.mean) / self.std

    def strong(self, rows):
        images = crop_and_mirror(self.images[rows], self.cfg.mirror)
        if self.cfg.channels == 3:  # Grey images get no operation in the published code.
            images = random_operation(images)
        return cutout((images / 255 - self.mean) / self.std, *self.cfg.cutout)

# (4) Both networks -------------------------------------------------------------------------
# Two pre-activation ResNet-18 start from different random weights. Each has a linear
# classifier f and a projection head, whose output z, of norm 1, is the image's embedding. As
# in the published code, BatchNorm comes after the first convolution, and none at the end.

EMBEDDING_DIM = 128  # D, published code

class PreActBlock(nn.Module):
    """Two convolutions beside a shortcut; both paths begin after bn1 and its ReLU."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            # AvgPool2d strides, since nn.Conv2d(4, 8, 1, stride=2) on channels-last [2,4,8,8]
            # corrupts memory in its backward pass (torch 2.14, CPU; MALLOC_CHECK_=3 shows it).
            conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), conv)

    def forward(self, x):
        x = F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(x)))
        return self.conv2(y) + self.shortcut(x)

class CoRegNet(nn.Module):
    """Images [B,C,H,H] -> logits [B,K], embeddings [B,D] of norm 1; for any side from 8."""

    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128):
        super().__init__()
        self.bf16 = False  # DIFFERS: True has convolutions computed in bfloat16, for speed.
        layers = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        dim = width
        first_stride = 1 if image_size < 64 else 2
        for factor, stride in ((1, first_stride), (2, 2), (4, 2), (8, 2)):
            channels = factor * width
            layers += [PreActBlock(dim, channels, stride), PreActBlock(channels, channels, 1)]
            dim = channels
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(dim, num_classes)
        hidden = nn.Linear(dim, dim)
        self.head = nn.Sequential(hidden, nn.ReLU(), nn.Linear(dim, embedding_dim))

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(images).float()  # [B,dim]
        return self.fc(features), F.normalize(self.head(features))

def bf16_is_fast(device):
    """Are convolutions on a torch.device faster in bfloat16? On new GPUs and some CPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)

class Learner:
    """One of the two networks with all that belongs to it alone.

    losses: of all sets in the last epochs, list of [N]; split: predictions [N,K] and w [N].
    key_net: net's slow copy, in training mode, used without gradient; queue: its keys [n,D],
    their classes [n] and clean flags [n], section 9."""

    def __init__(self, num_classes, cfg, device):
        net = CoRegNet(num_classes, cfg.channels, cfg.image_size, cfg.width, EMBEDDING_DIM)
        self.net = net.to(device, memory_format=torch.channels_last)
        is_fast = cfg.precision == "auto" and bf16_is_fast(torch.device(device))
        self.net.bf16 = cfg.precision == "bf16" or is_fast
        # Published code: weight decay; SGD's own momentum of 0.9, which is not cfg.momentum.
        self.optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9, weight_decay=5e-4)
        self.key_net = copy.deepcopy(self.net)
        self.queue = MomentumQueue(cfg.queue_size, EMBEDDING_DIM, device)
        self.losses = []
        self.split = None

    def step(self, terms):
        """Optimizer step on the sum of loss terms, {name: scalar} -> the same, detached."""
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

# (5) Warm-up -------------------------------------------------------------------------------
# "Supervised Training": each network by itself learns, on strong views, that the labels of
# a set together have probability 1. Eq. 2 keeps it unsure, so that it does not learn wrong
# sets by heart. Outside autocast, the losses of sections 5 to 9 compute in float32.

def partial_cross_entropy(logits, candidates):
    """Eq. 1: mean of -log(sum_{k in S_i} p_ik + 1e-5). logits [B,K], S bool [B,K] -> scalar.
    Published code: the 1e-5; full sets do not count, and if all are full the loss is 0."""
    prob_of_set = (logits.float().softmax(1) * candidates).sum(1)  # [B]
    is_partial = ~candidates.bool().all(1)  # [B]
    losses = -torch.log(prob_of_set + 1e-5) * is_partial
    return losses.sum() / is_partial.sum().clamp_min(1)

def negative_entropy(logits):
    """Eq. 2: mean of sum_k p_ik log p_ik; lower is less sure. logits [B,K] -> scalar <= 0."""
    log_probs = logits.float().log_softmax(1)
    return (log_probs.exp() * log_probs).sum() / max(1, len(logits))

def random_batches(rows, batch_size):
    """Rows int [n] -> list of batches in random order; a last batch of one row is dropped."""
    batches = rows[torch.randperm(len(rows))].split(batch_size)
    return [batch for batch in batches if len(batch) > 1]  # DIFFERS: BatchNorm may need 2.

def mean_terms(steps):
    """Loss terms of all steps, a list of {name: scalar tensor} -> {name: mean, a float}."""
    return {name: torch.stack([terms[name] for terms in steps]).mean().item()
            for name in steps[0]}

def warm_up_epoch(learner, data, cfg):
    """An epoch of Eq. 3, the sum of both losses -> means of the loss terms."""
    learner.net.train()
    rows = torch.arange(len(data.images), device=data.images.device)
    batches = random_batches(rows, 2 * cfg.batch_size)  # twice: published code
    steps = []
    for batch in tqdm(batches, "warm-up", disable=None, leave=False):
        logits, _ = learner.net(data.strong(batch))
        set_loss = partial_cross_entropy(logits, data.candidates[batch])
        steps.append(learner.step({"set": set_loss, "entropy": negative_entropy(logits)}))
    return mean_terms(steps)

# (6) GMM split -----------------------------------------------------------------------------
# "Co-Pseudo-Labeling": before each later epoch both networks judge all sets, on weak views. A
# set with the true label is learnt early: its loss l_i is small. Two Gaussians are fitted to
# the losses; w_i is the chance that l_i is of the one of lower mean, and so set i is clean.
# Published code alone: alignment, scaling and averaging of losses, the first three constants.

MIXTURE_SETTINGS = dict(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4)
HISTORY_EPOCHS = 5
CLEAN_THRESHOLD = 0.5  # A set counts as clean if its w is above this.
MAX_LOSS = 88.0  # DIFFERS: losses stay finite; about -log of the least normal float32.

def align_distribution(probs, mean_probs, prior):
    """Moves mean p towards prior: normalise(p * prior / mean p). [B,K], [K], [K] -> [B,K]."""
    ratio = prior.float() / mean_probs.float().clamp_min(1e-8)  # 1e-8: a class never predicted
    aligned = probs.float() * ratio
    return aligned / aligned.sum(1, keepdim=True)

def max_candidate_loss(probs, candidates):
    """Eq. 4: l_i = -log max_{k in S_i} p_ik. probs [B,K], S bool [B,K] -> [B], finite."""
    largest = (probs.float() * candidates).amax(1)  # [B]
    return -largest.log().clamp_min(-MAX_LOSS)

def clean_probability(loss_history):
    """Losses [E,N] (no NaN, newest last) -> w [N], posterior of the component of lower mean.
    Each epoch's losses are scaled to 0..1, those of the last epochs averaged. DIFFERS: a fixed
    seed; if all are equal, nothing speaks against any set, and w is 1."""
    losses = loss_history[-HISTORY_EPOCHS:].float().clamp_max(MAX_LOSS)
    low = losses.amin(1, keepdim=True)  # [E,1]
    high = losses.amax(1, keepdim=True)  # [E,1]
    scaled = (losses - low) / (high - low).clamp_min(1e-12)  # 1e-12: where all are equal
    values = scaled.mean(0).cpu().numpy()[:, None]  # [N,1]
    if values.min() == values.max():
        return torch.ones_like(losses[0])
    with warnings.catch_warnings(action="ignore"):  # Ten rounds may well not converge.
        mixture = GaussianMixture(random_state=0, **MIXTURE_SETTINGS).fit(values)
    posterior = mixture.predict_proba(values)[:, mixture.means_.argmin()]  # [N]
    return torch.from_numpy(posterior).to(losses)

def balance_classes(clean_prob, losses, classes):
    """w, losses [N] -> new w: of each class the same share is clean, its sets of lowest loss.

    classes int [N]: the likeliest label in each set. losses: of the last epoch, not averaged,
    so that a class that is learnt again counts at once. A clean set gets 0.75 at least, any
    other 0. DIFFERS (--balance): one mixture for all may call no set of a hard class clean."""
    total_clean = (clean_prob > CLEAN_THRESHOLD).sum().item()
    balanced = torch.zeros_like(clean_prob)
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        num_clean = math.ceil(total_clean * len(members) / len(classes))
        lowest = members[losses[members].argsort()[:num_clean]]
        balanced[lowest] = clean_prob[lowest].clamp_min(0.75)  # Any number above 0.5 would do.
    return balanced

@torch.no_grad()
def split_data(learner, data, cfg):
    """A network judges all sets -> aligned predictions [N,K], w [N]; adds to learner.losses.

    DIFFERS: alignment divides by the mean prediction of this pass; the published mean mixes in
    older passes. If the clean sets are fewer than a batch and fewer than a tenth of all, the
    tenth of lowest loss is clean (published: an error if no set is clean, or if all are)."""
    learner.net.eval()
    rows = torch.arange(len(data.images), device=data.images.device)
    logits = torch.cat([learner.net(data.weak(batch))[0] for batch in rows.split(512)])
    probs = logits.softmax(1)  # [N,K]
    if "alignment" not in cfg.ablate:  # Classes that are rarely predicted rise.
        uniform = torch.full_like(probs[0], 1 / len(probs[0]))
        probs = align_distribution(probs, probs.mean(0), uniform)
    losses = max_candidate_loss(probs, data.candidates)  # [N]
    learner.losses = [*learner.losses, losses][-HISTORY_EPOCHS:]
    if "split" in cfg.ablate:
        return probs, torch.ones_like(losses)  # w = 1: Eq. 6 takes the partner alone
    clean_prob = clean_probability(torch.stack(learner.losses))
    if cfg.balance:
        classes = (probs * data.candidates).argmax(1)
        clean_prob = balance_classes(clean_prob, losses, classes)

    num_clean = (clean_prob > CLEAN_THRESHOLD).sum().item()
    tenth = max(2, len(losses) // 10)
    if num_clean < min(cfg.batch_size, tenth):
        print(f"split: too few sets ({num_clean}) are clean; the {tenth} of lowest loss count")
        clean_prob = (losses <= losses.kthvalue(tenth).values).float()  # with all that tie
    return probs, clean_prob

# (7) Co-pseudo-labeling, sharpening, mixup -------------------------------------------------
# Each network learns from the split of the other, its partner. The target of a clean sample is
# w times the partner's prediction within the set, plus 1 - w times the network's own; that of
# an unlabeled one, the mean of both. Mixup, Beta(4,4) and ramp: published code alone.

MIXUP_ALPHA = 4.0
RAMP_EPOCHS = 16

def sharpen(probs, temperature):
    """Eq. 7: normalise(p^(1/temperature)); below 1 it makes labels surer. [B,K] -> [B,K]."""
    return (probs.float().log() / temperature).softmax(1)  # the same, by logarithms

@torch.no_grad()
def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets of clean samples, Eq. 6 and 7: sharpen(w r + (1-w) own). [B,K], w [B] -> [B,K].

    own: own_probs, means over both weak views. r: partner_probs within the set, normalised
    (Eq. 5); no set may be empty. w: clean_prob, from the partner's split."""
    inside = partner_probs.float().clamp_min(1e-12) * candidates  # 1e-12: where all underflow
    r = inside / inside.sum(1, keepdim=True)
    w = clean_prob[:, None]
    return sharpen(w * r + (1 - w) * own_probs, temperature)

@torch.no_grad()
def guess_labels(probs, temperature):
    """Targets of unlabeled samples, Eq. 6, 7: sharpened mean. Predictions [V,B,K] -> [B,K]."""
    return sharpen(probs.float().mean(0), temperature)

def draw_mixup(count):
    """Number of rows -> lambda = max(b, 1-b) with b ~ Beta(4,4), and a random permutation."""
    b = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample().item()
    return max(b, 1 - b), torch.randperm(count)

def mixup(values, lam, permutation):
    """lambda * row + (1 - lambda) * permuted row. values [B,...], permutation int [B]."""
    return lam * values + (1 - lam) * values[permutation]

def ramp_up(epoch, warm_up, length=RAMP_EPOCHS):
    """From 0 at the end of the warm-up to 1 `length` epochs later; epoch may be a fraction."""
    return min(max((epoch - warm_up) / length, 0.0), 1.0)

def self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u):
    """Eq. 8: cross-entropy of clean rows + weight_u * mean squared error of unlabeled rows.
    All [B,K] -> scalar; no rows: 0. The mean is over classes, too, as in the published code;
    the paper sums over them."""
    sum_x = F.cross_entropy(logits_x.float(), targets_x.float(), reduction="sum")
    errors_u = (logits_u.float().softmax(1) - targets_u.float()) ** 2
    loss_u = errors_u.sum() / max(1, errors_u.numel())  # the mean
    return sum_x / max(1, len(logits_x)) + weight_u * loss_u

# (8) Prototype EMA alignment ---------------------------------------------------------------
# The prototype o_k of class k, 0 at first, is a moving average of the embeddings of its clean
# images. The softmax of z . o / tau is a second classifier; it learns the same targets. Both
# networks share the prototypes, so that their embedding spaces are aligned, too.

PROTO_TEMPERATURE = 0.3  # tau of Eq. 9, not cfg.temperature; published code

def update_prototypes(prototypes, embeddings, classes, momentum):
    """Eq. 10: o_k <- m o_k + (1-m) z for each z of class k in turn; then norm 1 -> [K,D].

    prototypes [K,D], embeddings [B,D], classes int64 [B]. The n steps of a class at once are
    m^n o_k + sum of (1-m) m^j z, where j is how many z of the class come later; for two:
    m (m o + (1-m) z_1) + (1-m) z_2 = m^2 o + (1-m) m z_1 + (1-m) z_2. No gradient."""
    belongs = F.one_hot(classes, len(prototypes)).float()  # [B,K]
    n = belongs.sum(0)  # [K]
    j = n - belongs.cumsum(0)  # [B,K]
    weights = belongs * (1 - momentum) * momentum**j
    kept = momentum ** n[:, None] * prototypes  # [K,D]
    return F.normalize(kept + weights.T @ embeddings.float()).detach()

def prototype_loss(similarity_x, targets_x, similarity_u, targets_u, weight_u,
                   temperature=PROTO_TEMPERATURE):
    """Eq. 9: KL(y || q) on clean rows, (q - y)^2 on unlabeled ones, up to constants -> scalar.

    similarity_x, _u: z . o [B,K] of mixed images; q = softmax(similarity / tau); targets: the
    mixed y = lam a + (1-lam) b. The published code has
        lam KL(a || q) + (1-lam) KL(b || q)   = cross-entropy(y, q) + a constant,
        lam (q - a)^2 + (1-lam) (q - b)^2     = (q - y)^2 + a constant.
    DIFFERS: without the constants (no gradient), this is Eq. 8 on similarity / tau."""
    logits_x = similarity_x / temperature
    logits_u = similarity_u / temperature
    return self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u)

# (9) MoCo queue, noisy supervised contrastive loss -----------------------------------------
# "Noisy Contrastive Learning". An anchor is the embedding of an image's first strong view; its
# key is that of the second, by a slow copy of the network. Each of the A anchors is compared
# with M entries: all anchors, their keys, and earlier keys (the queue). It is pulled to its
# own key and, if it is clean, to clean entries of its pseudo-class, the argmax of its target;
# other entries of the class are ignored; and it is pushed away from all the rest.

CONTRASTIVE_TEMPERATURE = 0.07  # tau of Eq. 11, published code

class MomentumQueue:
    """The last `size` keys [n,D] with their classes int [n] and clean flags bool [n].
    DIFFERS: it starts empty, not with random keys, classes and flags, which would mislead."""

    def __init__(self, size, dim, device="cpu"):
        self.size = size
        self.keys = torch.zeros(0, dim, device=device)
        self.classes = torch.zeros(0, dtype=torch.long, device=device)
        self.clean = torch.zeros(0, dtype=torch.bool, device=device)

    def push(self, keys, classes, clean):
        """Appends keys [n,D], without gradient, classes [n], flags [n]; drops the oldest."""
        first = max(0, len(self.keys) + len(keys) - self.size)  # the oldest that stays
        self.keys = torch.cat([self.keys, keys.detach().float()])[first:]
        self.classes = torch.cat([self.classes, classes])[first:]
        self.clean = torch.cat([self.clean, clean])[first:]

def contrastive_masks(classes, clean, num_anchors):
    """Pseudo-classes int [M], clean flags bool [M] -> positives, ignored: bool [A,M] (Eq. 11).

    The M entries are the A anchors, their keys in the same order, and the queue. positives:
    own key; same class if both are clean (an anchor itself, too). ignored: else same class."""
    same_class = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean  # [A,M]
    own_key = torch.zeros_like(same_class)
    own_key.diagonal(num_anchors).fill_(True)  # anchor i, entry A + i
    positives = (same_class & both_clean) | own_key
    return positives, same_class & ~positives

def supcon_loss(features, positives, ignored, temperature=CONTRASTIVE_TEMPERATURE):
    """Eq. 11: mean over anchors of the mean over positives of -log softmax(. / tau).

    features [M,D] of norm 1, the A anchors first; positives, ignored: bool [A,M]. An anchor is
    never contrasted with itself. DIFFERS: ignored entries are left out of a logsumexp in
    float32; the published code subtracts their sum, and the difference can fall below 0."""
    with torch.autocast(features.device.type, enabled=False):  # A caller may have it on.
        features = features.float()
        similarity = features[: len(positives)] @ features.T / temperature  # [A,M]
    itself = torch.zeros_like(positives)
    itself.fill_diagonal_(True)
    counted = similarity.masked_fill(ignored | itself, -math.inf)
    log_probs = similarity - counted.logsumexp(1, keepdim=True)  # [A,M]
    positives = positives & ~itself
    sums = log_probs.masked_fill(~positives, 0).sum(1)  # [A]
    return -(sums / positives.sum(1).clamp_min(1)).sum() / max(1, len(sums))

# (10) Evaluation ---------------------------------------------------------------------------
# The prediction is the class with the largest mean of both networks' logits. Printed figures
# with a * need true labels of training images, which only --synthetic lets into training.

@torch.no_grad()
def predict(learners, images, mean, std):
    """Images uint8 [N,C,H,H] -> mean of the networks' logits [N,K], in eval mode."""
    batches = images.to(mean.device).split(512)
    logits = []
    for learner in learners:
        learner.net.eval()
        outputs = [learner.net((batch / 255 - mean) / std)[0] for batch in batches]
        logits.append(torch.cat(outputs))
    return torch.stack(logits).mean(0)

def accuracy(scores, labels):
    """Percentage of images whose label, int [N] on the CPU, has the largest score, [N,K]."""
    right = scores.argmax(1).cpu() == labels
    return 100 * right.float().mean().item()

def coverage(candidates, labels):
    """Percentage of candidate sets, bool [N,K], that hold the label, int64 [N] on the CPU."""
    holds_label = candidates.cpu().gather(1, labels[:, None])
    return 100 * holds_label.float().mean().item()

def class_shares(logits, candidates):
    """How often each class is predicted, in percent of its share in the candidate sets, [K]:
    100 is as often as the sets say, 0 a class that is lost or that no set names. A set of n
    labels counts as 1/n of each. logits [N,K], candidates bool [N,K]."""
    predicted = F.one_hot(logits.argmax(1), logits.shape[1]).float().mean(0)  # [K]
    in_sets = (candidates / candidates.sum(1, keepdim=True)).mean(0)  # [K]
    shares = 100 * predicted / in_sets.clamp_min(1e-8)
    return shares * (in_sets > 0)

def evaluate(learners, logits, data, labels, class_names):
    """{name: figure}. logits [N,K], labels int [N] (true, or -1): of the training images."""
    shares = class_shares(logits, data.candidates)
    least = shares.argmin()
    figures = {"least_share": shares[least].item(), "least_class": class_names[least]}
    if learners[0].split is not None and "split" not in data.cfg.ablate:
        clean = [learner.split[1] > CLEAN_THRESHOLD for learner in learners]
        figures["clean"] = torch.stack(clean).sum().item() / 2  # sets, mean of both networks
        if labels.min() >= 0:  # printed as right*%: clean sets that hold the true label
            right = [coverage(data.candidates[mask], labels[mask.cpu()]) for mask in clean]
            figures["split_precision"] = sum(right) / 2
    return figures

# (11) Training -----------------------------------------------------------------------------
# After the warm-up, in every epoch, both networks split the data. Then network 1 trains on the
# split of network 2, its partner, and network 2 on that of network 1.

def endless_batches(rows, batch_size):
    """Batches without end, a new order each round; with fewer than 2 rows, empty batches."""
    while True:
        batches = random_batches(rows, batch_size)
        if not batches:
            yield rows[:0]
        yield from batches

def co_train_epoch(own, partner, prototypes, data, cfg, epoch):
    """A network learns for an epoch from the split of its partner -> means of the loss terms.
    own, partner: Learners. prototypes [K,D] change in place. epoch: of the run, from 0."""
    own.key_net.load_state_dict(own.net.state_dict())  # each epoch a copy: published code
    # Published code: the partner predicts in eval mode, the network itself in training mode.
    partner.net.eval()
    own.net.train()  # last: with --ablate co-pl both are one network, in training mode.
    partner_probs, clean_prob = partner.split
    rows_x = (clean_prob > CLEAN_THRESHOLD).nonzero().flatten()
    rows_u = (clean_prob <= CLEAN_THRESHOLD).nonzero().flatten()
    if "unlabeled" in cfg.ablate:
        rows_u = rows_u[:0]
    # Are Eq. 9-11 used yet? ">" and not ">=": published code. DIFFERS: until then they are not
    # computed, to save time, so prototypes and queue do not move.
    with_representation = epoch > cfg.warm_up + cfg.start_contrastive

    batches_x = random_batches(rows_x, cfg.batch_size)
    batches_u = endless_batches(rows_u, cfg.batch_size)
    steps = []
    for step, batch_x in enumerate(tqdm(batches_x, "co-train", disable=None, leave=False)):
        batch_u = next(batches_u)

        # Views: two weak and two strong ones of every image.
        rows = torch.cat([batch_x, batch_x, batch_u, batch_u])
        sizes = [len(batch_x)] * 2 + [len(batch_u)] * 2
        x_w1, x_w2, u_w1, u_w2 = data.weak(rows).split(sizes)
        x_s1, x_s2, u_s1, u_s2 = data.strong(rows).split(sizes)

        with torch.no_grad():
            # Targets of unlabeled samples: the mean of both networks on both weak views.
            targets_u = partner_probs[:0]  # [0,K], if there are none
            if len(batch_u):
                # BatchNorm in training mode depends on the whole pass: one view at a time.
                logits_u = [own.net(u_w1)[0], own.net(u_w2)[0]]
                logits_u += partner.net(torch.cat([u_w1, u_w2]))[0].chunk(2)  # V = 4
                targets_u = guess_labels(torch.stack(logits_u).softmax(2), cfg.temperature)

            # Targets of clean samples: the partner's predictions of its split, and own ones.
            logits_w1, z_w1 = own.net(x_w1)  # z: embeddings
            logits_w2, _ = own.net(x_w2)
            own_probs = (logits_w1.softmax(1) + logits_w2.softmax(1)) / 2
            targets_x = refine_labels(
                own_probs, partner_probs[batch_x], data.candidates[batch_x],
                clean_prob[batch_x], cfg.temperature)

        # Mixup of all strong views; the first n rows count as clean, whatever is mixed in.
        n = 2 * len(batch_x)
        lam, permutation = draw_mixup(len(rows))
        if "mixup" in cfg.ablate:
            lam = 1.0
        targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
        mixed_targets = mixup(targets, lam, permutation)  # [2 B_x + 2 B_u, K]
        y_x, y_u = mixed_targets[:n], mixed_targets[n:]
        mixed_images = mixup(torch.cat([x_s1, x_s2, u_s1, u_s2]), lam, permutation)

        # Self-training, Eq. 8.
        logits, embeddings = own.net(mixed_images)
        weight_u = cfg.lambda_u * ramp_up(epoch + step / len(batches_x), cfg.warm_up)
        terms = {"self": self_training_loss(logits[:n], y_x, logits[n:], y_u, weight_u)}

        # Prototypes: first weak views of clean samples move them (Eq. 10), mixed images are
        # drawn to them (Eq. 9). Published code: here lambda_u has no ramp.
        if with_representation and "prototype" not in cfg.ablate:
            moved = update_prototypes(prototypes, z_w1, targets_x.argmax(1), cfg.momentum)
            prototypes.copy_(moved)
            similarity = embeddings @ prototypes.T  # [2 B_x + 2 B_u, K]
            proto_loss = prototype_loss(similarity[:n], y_x, similarity[n:], y_u, cfg.lambda_u)
            terms["prototype"] = cfg.proto_weight * proto_loss

        # Contrast, Eq. 11: anchors of the first strong views, keys of the second, not mixed.
        if with_representation:
            _, anchors = own.net(torch.cat([x_s1, u_s1]))
            with torch.no_grad():
                for key_weight, weight in zip(own.key_net.parameters(), own.net.parameters()):
                    key_weight.mul_(cfg.momentum).add_(weight, alpha=1 - cfg.momentum)
                _, keys = own.key_net(torch.cat([x_s2, u_s2]))
            classes = torch.cat([targets_x, targets_u]).argmax(1)
            is_x = torch.arange(len(classes), device=rows.device) < len(batch_x)
            clean = is_x | ("supcon" in cfg.ablate)  # --ablate supcon: all count as clean
            all_classes = torch.cat([classes, classes, own.queue.classes])  # [M]
            all_clean = torch.cat([clean, clean, own.queue.clean])  # [M]
            features = torch.cat([anchors, keys, own.queue.keys])  # [M,D]
            positives, ignored = contrastive_masks(all_classes, all_clean, len(anchors))
            contrast = supcon_loss(features, positives, ignored)
            terms["contrastive"] = cfg.contrastive_weight * contrast
            own.queue.push(keys, classes, clean)

        steps.append(own.step(terms))
    return mean_terms(steps)

def cosine_lr(epoch, lr, period):
    """Half a cosine from lr to lr/1000 at `period` epochs. DIFFERS: it does not rise again."""
    low = lr / 1000
    return low + (lr - low) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2

def train_epoch(learners, prototypes, data, cfg, epoch):
    """Both networks learn for an epoch, counted from 0 -> means of their loss terms."""
    for learner in learners:
        lr = cosine_lr(epoch, cfg.lr, cfg.lr_period or cfg.epochs)
        learner.optimizer.param_groups[0]["lr"] = lr
    if epoch < cfg.warm_up:
        terms_1, terms_2 = [warm_up_epoch(learner, data, cfg) for learner in learners]
    else:
        for learner in learners:
            learner.split = split_data(learner, data, cfg)
        partners = learners if "co-pl" in cfg.ablate else learners[::-1]
        terms_1, terms_2 = [co_train_epoch(own, partner, prototypes, data, cfg, epoch)
                            for own, partner in zip(learners, partners)]
    return {name: (terms_1[name] + terms_2[name]) / 2 for name in terms_1}

# (12) Data sets ----------------------------------------------------------------------------
# From here on: the tool. A data set is a sequence of pairs (PIL image or path of a photo,
# label), mostly torchvision's; the label -1 means that nobody knows it. In files an image goes
# by its name: a photo's path below train/, or else its number in the data set.

DIGITS = "zero one two three four five six seven eight nine".split()
SIGNS = phrases("""Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60;
    Speed limit 70; Speed limit 80; Speed limit 80 cancelled; Speed limit 100; Speed limit 120;
    No passing; No truck overtaking; Only have priority at the next intersection;
    Priority road; Give way; Stop; All vehicles prohibited; Trucks prohibited; No entry;
    Caution!; Curve (to the left); Curve (to the right); Continuous curves; Rough road;
    Slippery road; The road narrows on the right; Construction site; Signal light;
    Pay attention to pedestrians; Pay attention to children; Watch out for bikes;
    Watch out for snow/ice on the road; Deer ahead; Unlimited speed; Turn right; Turn left;
    Go straight; Go straight and turn right; Go straight and turn left; Drive on the right;
    Drive on the left; Driving around the island; Lift ban on no passing;
    Lift ban on truck overtaking""")
CLASS_NAMES = {  # The other data sets bring their names with them.
    "digits": DIGITS,
    "svhn": [f"number {digit}" for digit in range(10)],
    "gtsrb": [f"German Traffic Sign: {sign}" for sign in SIGNS],
}

PRESETS = {  # as in the published code; those of digits and folder are this file's own
    "digits": dict(
        channels=1, image_size=8, mirror=False, cutout=[0, 0.33], clip_model="tiny",
        templates="digits", width=16, epochs=20, warm_up=8, start_contrastive=1,
        batch_size=64, lr=0.05, lr_period=0, momentum=0.99, queue_size=1024, precision="fp32"),
    "folder": dict(width=16, epochs=24, warm_up=8, start_contrastive=5, batch_size=20, lr=0.05,
                   lr_period=0, ablate=["mixup", "split"]),
    "cifar10": dict(),
    "cifar100": dict(warm_up=100),
    "svhn": dict(mirror=False),
    "fmnist": dict(channels=1, image_size=28, cutout=[16 / 28] * 2, epochs=100),
    "eurosat": dict(image_size=64, epochs=100),
    "gtsrb": dict(image_size=64, mirror=False, epochs=100),
}

def standard(text):
    """Strips a name, makes both forms of "é" one (NFC), and fails if no UTF-8 can hold it."""
    return unicodedata.normalize("NFC", text.strip()).encode().decode()

def to_square(image):
    """PIL image -> its centre square in RGB, upright by its EXIF data, on white."""
    square = TF.center_crop(image, min(image.size))  # first: the steps below copy the image
    with contextlib.suppress(Exception):  # Damaged EXIF data raise any kind of error.
        square = ImageOps.exif_transpose(square)
    if square.has_transparency_data:
        square = square.convert("RGBA")
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    return square.convert("RGB")

def open_image(path):
    """Image file -> PIL image as to_square() makes it. UserError if it cannot be read."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":  # Pillow would cut brighter values off.
            raise ValueError("it has more than 8 bits of grey")
        image.load()
    except MemoryError:  # no fault of the photo
        raise
    except Exception as error:  # A broken file makes Pillow raise nearly any kind of error.
        raise UserError(f"{path}: expected an image that can be read, but {error}") from error
    return to_square(image)

def find_images(root):
    """Pairs (image file at any depth, top folder in root or ""), sorted; no GIF, no HEIC."""

    def fail(error):
        raise UserError(f"{root}: expected a folder of images, but {error}") from error

    pairs = []
    for folder, inner, files in os.walk(root, onerror=fail, followlinks=True):
        inner[:] = [name for name in inner if name[0] != "."]  # os.walk() skips the others.
        top = standard(Path(folder).relative_to(root).parts[0]) if folder != str(root) else ""
        for path in [Path(folder, name) for name in files if name[0] != "."]:
            if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS:
                pairs.append((path, top))
            elif not path.suffix and not path.exists():
                raise UserError(f"{path}: expected a link to something, not in circles")
    return sorted(pairs)

def read_photos(root, classes):
    """root/train and perhaps root/test -> training pairs, test pairs, class names. Folders in
    train/ name the classes; or, with classes such as "cat,dog", its images have no labels."""
    train = find_images(f"{root}/train")
    test = find_images(f"{root}/test") if os.path.lexists(f"{root}/test") else []
    if classes:
        class_names = [standard(name) for name in classes.split(",")]
    else:
        class_names = sorted({standard(path.name) for path in Path(root, "train").iterdir()
                              if path.name[0] != "." and path.is_dir()})
        odd = {folder for _, folder in train} ^ set(class_names)
        if odd:
            raise UserError(f"{root}/train: expected images in each folder, and none beside"
                            f" them (''), or --classes; look at {sorted(odd)}")
    strangers = {folder for _, folder in test} - set(class_names)
    if strangers:
        raise UserError(f"{root}/test: expected {class_names}, got {sorted(strangers)}")
    train = [(path, -1 if classes else class_names.index(folder)) for path, folder in train]
    test = [(path, class_names.index(folder)) for path, folder in test]
    return train, test, class_names

def read_known(name, root):
    """Any data set but a folder -> training part, test part or None."""
    if name == "digits":  # scikit-learn's 1,797 images of 8 x 8 pixels, with values 0 to 16
        digits = load_digits()
        pixels = (digits.images * 255 / 16).astype("uint8")
        return list(zip(map(Image.fromarray, pixels), digits.target.tolist())), None
    if name == "eurosat":
        return datasets.EuroSAT(root, download=True), None
    readers = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
               "fmnist": datasets.FashionMNIST, "svhn": datasets.SVHN, "gtsrb": datasets.GTSRB}
    parts = ("train", "test") if name in ("svhn", "gtsrb") else (True, False)
    return [readers[name](root, part, download=True) for part in parts]

def read_dataset(cfg):
    """Settings -> training pairs, their names, test pairs (perhaps none), class names."""
    if cfg.dataset == "folder":
        train, test, class_names = read_photos(cfg.data_dir, cfg.classes)
        root = Path(cfg.data_dir, "train")
        names = [standard(path.relative_to(root).as_posix()) for path, _ in train]
    else:
        try:
            train, test = read_known(cfg.dataset, cfg.data_dir)
        except (OSError, RuntimeError, EOFError, TarError, BadZipFile) as error:
            raise UserError(f"--data-dir {cfg.data_dir}: expected all of {cfg.dataset},"
                            f" but {error!r}") from error
        class_names = CLASS_NAMES.get(cfg.dataset) or train.classes
        names = [str(row) for row in range(len(train))]
    if len(set(class_names)) < max(2, len(class_names)) or "" in class_names:
        raise UserError(f"--classes, folders: expected 2 or more unlike names: {class_names}")

    # The same order for every --seed; without a test part, its last fifth is held out.
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    if test is None:
        num_train = round(0.8 * len(rows))
        test = Subset(train, rows[num_train:])
        rows = rows[:num_train]
    rows = sorted(rows[: cfg.num_samples])  # [:None] keeps all
    return Subset(train, rows), [names[row] for row in rows], test, class_names

def load(pairs, transform):
    """Pairs -> batches (rows, transformed images, labels) of those that can be read; it prints
    the others. Of a photo only the transformed image is kept: photos are large."""

    def read(row):
        image, label = pairs[row]
        if isinstance(image, Path):
            try:
                image = open_image(image)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
                return None
        return row, transform(image), label

    with ThreadPoolExecutor(4) as pool:
        for rows in tqdm(torch.arange(len(pairs)).split(256), "read", disable=None):
            batch = [item for item in pool.map(read, rows.tolist()) if item]
            if batch:
                good_rows, images, labels = zip(*batch)
                yield good_rows, torch.stack(images), torch.tensor(labels)

def to_pixels(image, cfg):
    """PIL image -> uint8 [C,H,H], what the networks see."""
    mode = "L" if cfg.channels == 1 else "RGB"
    return TF.pil_to_tensor(TF.resize(image.convert(mode), [cfg.image_size] * 2))

def read_images(pairs, cfg, least=1):
    """Pairs -> rows that can be read (`least` or more), uint8 [N,C,H,H], labels int [N]."""
    batches = list(load(pairs, lambda image: to_pixels(image, cfg)))
    rows = [row for batch in batches for row in batch[0]]
    if len(rows) < least:
        raise UserError(f"--data-dir {cfg.data_dir}: expected {least} images that can be read")
    _, images, labels = zip(*batches)
    return rows, torch.cat(images), torch.cat(labels)

def read_annotations(path, names, class_names):
    """CSV file with columns path and label, a line an answer -> numbers of answers [N,K]."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, restval="")
            answers = [(lines.line_num, standard(line["path"]), standard(line["label"]))
                       for line in lines]
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file in UTF-8 with a first line that names"
                        f" path and label between commas, but {error!r}") from error
    votes = torch.zeros(len(names), len(class_names), dtype=torch.int32)
    rows = {name: row for row, name in enumerate(names)}
    for line, name, label in answers:
        if label and label not in class_names:
            raise UserError(f"{path}, line {line}: {label!r} is not one of {class_names}")
        if label and name in rows:
            votes[rows[name], class_names.index(label)] += 1
    num_others = sum(name not in rows for _, name, _ in answers)
    num_empty = (votes.sum(1) == 0).sum().item()
    print(f"{path}: {num_others} lines are of other images; {num_empty} images have no answer")
    if num_empty == len(names):
        raise UserError(f"{path}: expected answers, with paths such as {names[0]!r}")
    return votes

def combine_answers(probs, votes, rounds=10, hard_share=0.0):
    """Predictions [N,K], numbers of answers [N,K] -> probabilities of the labels [N,K].

    One-coin model (Dawid and Skene, 1979; Raykar et al., 2010): an answer is right with chance
    a, or else any other label. But a share of images is hard: there, a table says how likely a
    class gets which answer (favourite mistakes). Labels, a and table are fitted in turn."""
    num_classes = probs.shape[1]
    probs = probs.clamp_min(1e-6)
    votes = votes.float()
    log_prior = torch.cat([(1 - hard_share) * probs, hard_share * probs], 1).log()  # [N,2K]
    labels = F.pad(votes, [0, num_classes])  # [N,2K]; not probs: they may be all one class
    for _ in range(rounds):
        easy, hard = (labels.T @ votes).split(num_classes)  # [K,K]: of each class, its answers
        a = (easy.trace() / easy.sum().clamp_min(1)).clamp(0.001, 0.999).item()
        coin = torch.full_like(easy, (1 - a) / (num_classes - 1)).fill_diagonal_(a)
        table = F.normalize(hard + 100 / num_classes, p=1)  # even, while answers are few
        chances = torch.cat([coin, table])  # [2K,K]
        labels = (log_prior + votes @ chances.log().T).softmax(1)
    return sum(labels.split(num_classes, 1))

def write_csv(path, mode, header, rows):
    with open(path, mode, newline="", encoding="utf-8-sig") as file:  # -sig is for Excel.
        csv.writer(file).writerows([header, *rows])

# (13) The command line ---------------------------------------------------------------------
# The value of a setting is the first that is found: on the command line, in the run to resume
# except for the device, in the preset of the data set, in the defaults of section 0. A run
# keeps what was used before training, and what fixes the sizes of its tensors.

KEPT = """dataset classes num_samples annotations synthetic clip_model clip_pretrained
    templates seed output_dir image_size channels width queue_size""".split()

def parse(argv):
    """Words of the command line -> settings. SystemExit(2), or UserError: bad --resume."""
    usage = "coreg.py [--flag value ...]; coreg.py --help shows all flags"
    parser = argparse.ArgumentParser("coreg.py", usage, add_help=False, allow_abbrev=False)
    add_settings(parser)
    # A first pass reads --dataset, --annotations and --resume, which set the defaults of the
    # second, and which of three settings are given. --help comes later: it shows the defaults.
    unset = argparse.Namespace(batch_size=None, epochs=None, warm_up=None)
    given, _ = parser.parse_known_args(argv, unset)
    own_dir = time.strftime(f"runs/{given.dataset}-seed{given.seed}-%Y%m%d-%H%M%S")
    parser.set_defaults(**PRESETS[given.dataset], output_dir=own_dir)
    if not given.annotations:  # The preset folder leaves parts out for answers from a file.
        parser.set_defaults(ablate=[])
    saved = read_checkpoint(given.resume)["settings"] if given.resume else {}
    parser.set_defaults(**saved | {"device": given.device})
    parser.add_argument("-h", "--help", action="help", help="show this, with (defaults)")
    cfg = parser.parse_args(argv)
    cfg.batch_fits = given.batch_size is None and not saved
    cfg.epochs_fit = given.epochs is None and given.warm_up is None and not saved
    for name in KEPT:
        if saved and getattr(cfg, name) != saved[name]:
            parser.error(f"--resume: leave --{name.replace('_', '-')} out: a run keeps it")
    if cfg.warm_up > cfg.epochs:
        parser.error(f"--warm-up {cfg.warm_up} is more than --epochs {cfg.epochs}: set both")
    if cfg.synthetic and (cfg.annotations or cfg.classes):
        parser.error("--synthetic: expected no --annotations and no --classes beside it")
    if cfg.classes and cfg.dataset != "folder":
        parser.error("--classes: expected --dataset folder beside it")
    if cfg.balance and "split" in cfg.ablate:
        parser.error("--balance needs the split: put --ablate beside it, without that word")
    return cfg

# (14) The run: its files -------------------------------------------------------------------
# A run's folder holds checkpoint.pt, all that --resume and load_classifier() need, and, for
# people, metrics.jsonl (a record of every epoch), annotations.csv (the answers, or the labels
# of the sets) and labels.csv (the training images' labels after the last epoch).

def read_checkpoint(folder, device="cpu"):
    """A run's folder -> the dict that save() wrote there."""
    path = Path(folder, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, device, weights_only=True)
    except Exception as error:  # A damaged file makes torch raise nearly any kind of error.
        raise UserError(f"{path}: expected a run's complete checkpoint: {error!r}") from error
    if "names" not in checkpoint or vars(parse([])).keys() - checkpoint["settings"].keys():
        raise UserError(f"{path}: expected a checkpoint of this version of coreg.py")
    return checkpoint

def save(folder, state, learners):
    """Writes metrics.jsonl, and checkpoint.pt: a run's state, with that of its learners."""
    text = "".join(json.dumps(record) + "\n" for record in state["records"])
    (folder / "metrics.jsonl").write_text(text)
    state["random_state"] = torch.get_rng_state()
    state["learners"] = [{
        "net": learner.net.state_dict(), "optimizer": learner.optimizer.state_dict(),
        "queue": [learner.queue.keys, learner.queue.classes, learner.queue.clean],
        "losses": learner.losses} for learner in learners]
    content = io.BytesIO()  # torch.save() itself hides why a file cannot be written.
    torch.save(state, content)
    (folder / "checkpoint.tmp").write_bytes(content.getbuffer())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # whole at any time

def get_answers(cfg, pairs, names, labels, class_names):
    """Numbers of answers, int [N,K]: of a file; or 1 for each label of a set made here."""
    if cfg.synthetic:
        generator = torch.Generator().manual_seed(cfg.seed)
        return flip_candidates(labels, len(class_names), *cfg.synthetic, generator).int()
    if cfg.annotations:
        return read_annotations(cfg.annotations, names, class_names)
    templates = TEMPLATES.get(cfg.templates) or phrases(cfg.templates)
    if any("{}" not in template for template in templates):
        raise UserError(f"--templates: expected {{}} for the class in each of {templates}")
    clip = load_clip(cfg.clip_model, cfg.clip_pretrained, cfg.device)
    mean_probs, candidates = annotate(clip, pairs, class_names, templates, cfg.device)
    if labels.min() >= 0:
        print("the annotator, the mean of its templates, is right in*:"
              f" {accuracy(mean_probs, labels):.2f} %")
    return candidates.int()

def run(cfg):
    """Images -> candidate sets -> training -> the files of the run."""
    try:
        device = torch.zeros(1, device=cfg.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: expected one that works: {error}") from error
    folder = Path(cfg.resume or cfg.output_dir)

    # The images.
    pairs, names, test_pairs, class_names = read_dataset(cfg)
    print(f"{len(class_names)} classes: {', '.join(class_names)}")
    print(f"results go to {folder}", flush=True)
    if not cfg.resume:
        folder.mkdir(parents=True, exist_ok=True)
        files = {"annotations.csv", "checkpoint.pt", "labels.csv", "metrics.jsonl"}
        taken = sorted(files & {*os.listdir(folder)})
        if taken or not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: expected a folder that may be written, without a run;"
                            f" it holds {taken}; --resume goes on from a checkpoint.pt")
    rows, images, labels = read_images(pairs, cfg, least=2)
    pairs = Subset(pairs, rows)
    names = [names[row] for row in rows]
    test = read_images(test_pairs, cfg)[1:] if len(test_pairs) else ([], [])
    print(f"{cfg.dataset}: {len(images)} training, {len(test[1])} test images, on {device}")
    pixel_means = torch.stack([image.float().mean() for image in images])  # [N]

    # Their candidate sets. On a resume, 3 of 255 allows for another decoder of the photos.
    if cfg.resume:
        state = read_checkpoint(folder, device)
        same = state["names"] == names and state["class_names"] == class_names
        if not same or (state["pixel_means"].cpu() - pixel_means).abs().max() > 3:
            raise UserError(f"--data-dir {cfg.data_dir}: expected the images of {folder}")
    else:
        votes = get_answers(cfg, pairs, names, labels, class_names)
        lines = [(names[row], class_names[k]) for row, k in votes.nonzero().tolist()
                 for _ in range(votes[row, k])]
        write_csv(folder / "annotations.csv", "x", ("path", "label"), lines)
        state = dict(
            class_names=class_names, names=names, pixel_means=pixel_means, votes=votes,
            learners=[], records=[],
            prototypes=torch.zeros(len(class_names), EMBEDDING_DIM, device=device))
    votes = state["votes"].to(device)
    candidates = (votes > 0) | (votes.sum(1, keepdim=True) == 0)  # no answer: a full set
    print(f"candidate sets: {candidates.sum(1).float().mean():.2f} labels on average")
    if labels.min() >= 0:
        print(f"sets without the true label*: {100 - coverage(candidates, labels):.2f} %")

    # The state of training.
    if cfg.batch_fits:
        cfg.batch_size = min(cfg.batch_size, max(8, len(images) // 20))
    times = max(1, 240 // len(images)) if cfg.epochs_fit else 1  # Few images make few steps.
    cfg.epochs *= times
    cfg.warm_up *= times
    cfg.lr_period *= times
    torch.manual_seed(cfg.seed)
    data = WeakStrongImages(images.to(device), candidates, cfg)
    learners = [Learner(len(class_names), cfg, device) for _ in range(2)]
    for learner, saved in zip(learners, state["learners"]):  # none in a new run
        learner.net.load_state_dict(saved["net"])
        learner.optimizer.load_state_dict(saved["optimizer"])
        learner.queue.push(*saved["queue"])
        learner.losses = saved["losses"]
    state.update(settings=vars(cfg), mean=data.mean, std=data.std)
    if cfg.resume:
        torch.set_rng_state(state["random_state"].cpu())
    else:
        save(folder, state, learners)

    # Training.
    print(f"width {cfg.width} batch {cfg.batch_size} epochs {cfg.epochs} warm-up {cfg.warm_up}"
          f" lr {cfg.lr} balance {cfg.balance} ablate {cfg.ablate}")
    print("epoch    phase    loss   clean   test% right*% seconds  least share", flush=True)
    for epoch in range(len(state["records"]), cfg.epochs):  # DIFFERS: published: epochs + 1
        start = time.perf_counter()
        terms = train_epoch(learners, state["prototypes"], data, cfg, epoch)
        loss = sum(terms.values())
        logits = predict(learners, data.images, data.mean, data.std)
        if not math.isfinite(loss) or not logits.isfinite().all():  # after the last step
            raise UserError(f"epoch {epoch + 1} not finite, {terms}: --resume with lower --lr")
        phase = "warm-up" if epoch < cfg.warm_up else "co-train"
        figures = evaluate(learners, logits, data, labels, class_names)
        record = {"epoch": epoch + 1, "phase": phase, "loss": loss, **terms, **figures}
        if len(test[1]):
            test_logits = predict(learners, test[0], data.mean, data.std)
            record["test_acc"] = accuracy(test_logits, test[1])
        record["seconds"] = time.perf_counter() - start
        state["records"].append(record)
        # labels.csv: predictions, combined with a file's answers or, after a split, the sets.
        probs = logits.softmax(1)
        if cfg.annotations:
            probs = combine_answers(probs, votes, hard_share=0.1)
        elif "clean" in record:
            clean_prob = (learners[0].split[1] + learners[1].split[1]) / 2
            probs = refine_labels(probs, probs, data.candidates, clean_prob, temperature=1.0)
        best = zip(names, probs.argmax(1).tolist(), probs.amax(1).tolist())
        lines = [(name, class_names[k], f"{prob:.3f}") for name, k, prob in best]
        write_csv(folder / "labels.csv", "w", ("path", "label", "probability"), lines)
        save(folder, state, learners)
        line = f"{epoch + 1:5} {phase:>8} {loss:7.4f}"
        for name in ("clean", "test_acc", "split_precision", "seconds"):
            line += f" {record[name]:7.1f}" if name in record else f" {'-':>7}"
        print(f"{line}  {record['least_share']:.0f} % of {record['least_class']}", flush=True)
    print(f"finished after epoch {len(state['records'])}, see labels.csv in {folder}")
    if "test_acc" in state["records"][-1]:
        print(f"result: {state['records'][-1]['test_acc']:.1f} % of test images right")

def load_classifier(folder, device="cpu"):
    """A run's folder -> class names, function: list of 8-bit PIL images -> probs [n,K]."""
    checkpoint = read_checkpoint(folder, device)
    cfg = argparse.Namespace(**checkpoint["settings"])
    learners = [Learner(len(checkpoint["class_names"]), cfg, device) for _ in range(2)]
    for learner, state in zip(learners, checkpoint["learners"]):
        learner.net.load_state_dict(state["net"])

    def classify(images):
        if cfg.dataset == "folder":  # Images of other data sets are not cut to squares.
            images = [to_square(image) for image in images]
        pixels = torch.stack([to_pixels(image, cfg) for image in images])  # [n,C,H,H]
        return predict(learners, pixels, checkpoint["mean"], checkpoint["std"]).softmax(1)

    return checkpoint["class_names"], classify

def main(argv=None):
    """Command line -> exit code: 0, 2 (the user can mend it), 130 (Ctrl-C); or SystemExit."""
    folder = "RUN"
    try:
        cfg = parse(argv)
        folder = cfg.resume or cfg.output_dir
        run(cfg)
        return 0
    except KeyboardInterrupt:
        print(f"coreg.py: interrupted; --resume {folder}, if training began", file=sys.stderr)
        return 130
    except (UserError, OSError, UnicodeEncodeError, torch.OutOfMemoryError) as error:
        names_no_file = isinstance(error, OSError) and not error.filename  # as of a full disk
        text = f"{folder}: {error}" if names_no_file else f"{error}"
        print("coreg.py:", " ".join(text.split()), file=sys.stderr)
        return 2

# (15) Appendix: TinyCLIP -------------------------------------------------------------------
# The annotator of the digits has CLIP's interface and learns nothing: it draws the prompt in
# a style, and a feature is the 64 pixels of a drawing or an image, centred, of norm 1. It
# errs, and its templates disagree. Styles and numbers were chosen with true labels.

class TinyCLIP:
    """What annotate() needs of a CLIP, without weights; normalize is ignored."""

    logit_scale = torch.tensor(20.0).log()  # annotate() takes its exp, as of CLIP's.

    def encode_image(self, images, normalize):
        pixels = images.flatten(1)  # [B,64]
        return F.normalize(pixels - pixels.mean(1, keepdim=True))

    encode_text = encode_image  # The "tokens" of a prompt are its drawing.

def tiny_pixels(image):
    """The preprocessing: PIL image -> float [1,8,8]."""
    return TF.pil_to_tensor(image.convert("L").resize((8, 8))) / 255

def draw(prompts):
    """The tokenizer: prompts such as 'a wide number six' -> drawings, float [n,1,8,8]."""
    drawings = []
    for prompt in prompts:
        words = prompt.split()
        if len(words) != 4 or words[3] not in DIGITS:
            raise UserError(f"--clip-model tiny: expected 'a wide number six', got {prompt!r}")
        style = words[1]  # unknown styles are plain
        width = {"narrow": 16, "wide": 30}.get(style, 20)
        slant = -15.0 if style == "slanted" else 0.0  # in degrees
        outlines = style == "printed"  # This font is made of outlines, the other of pixels.
        font = ImageFont.load_default(30) if outlines else ImageFont.load_default_imagefont()
        image = Image.new("L", (64, 64))
        digit = str(DIGITS.index(words[3]))
        ImageDraw.Draw(image).text((20, 12), digit, 255, font, stroke_width=1)
        image = image.crop(image.getbbox()).resize((width, 40))
        image = TF.affine(TF.center_crop(image, 64), 0, [0, 0], 1.0, [slant, 0.0])
        image = ImageOps.pad(image.crop(image.getbbox()), (8, 8), Image.Resampling.BOX)
        drawings.append(tiny_pixels(image))
    return torch.stack(drawings)

if __name__ == "__main__":
    sys.exit(main())
