"""Tests of coreg.py: no network, no data but what they make. Run: python -m pytest -q test_coreg.py"""
import csv, errno, io, json, math, multiprocessing, os, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coreg as C

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

# ---- Section 11: whole runs ---------------------------------------------------------------------

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SMALL = ["--image-size", "8", "--width", "4", "--batch-size", "8", "--epochs", "4", "--warm-up", "2",
         "--start-contrastive", "0", "--lr", "0.05", "--embedding-dim", "8", "--queue-size", "64"]


def paint(path, colour, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(-25, 25, (*size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """36 unlabeled squares, 9 labelled ones, and votes of 5 annotators that err and disagree."""
    root = tmp_path_factory.mktemp("photos")
    for i, (name, colour) in enumerate(COLOURS.items()):
        for j in range(12):
            paint(root / "train" / f"{j:02}{name}.png", colour)
        for j in range(3):
            paint(root / "test" / name / f"{j}.png", colour)
    truth = torch.tensor([i for _ in range(12) for i in (2, 1, 0)])  # sorted: blue, green, red
    wrong = torch.rand(5, 36, generator=torch.Generator().manual_seed(0)) < 0.3
    np.savez(root / "votes.npz", votes=torch.where(wrong, (truth + 1) % 3, truth).numpy())
    return root


def arguments(photos, folder, *more):
    return ["--dataset", "folder", "--data-dir", str(photos), "--classes", "red,green,blue",
            "--annotations", str(photos / "votes.npz"), "--output-dir", str(folder), *SMALL, *more]


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("coreg.py: ") and len(error) < 900, error
    for word in words:
        assert str(word) in error, error


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert C.main(arguments(photos, folder)) == 0
    return folder


def test_run_files(finished):
    records, config = metrics(finished), json.loads((finished / "config.json").read_text())
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and config["epochs"] == 4
    assert [r["phase"] for r in records] == ["warm-up"] * 2 + ["co-train"] * 2
    for r in records:
        assert r["loss"] == pytest.approx(sum(r[name] for name in C.TERMS))
        assert {"lr", "clean", "test_acc", "test_acc_net1", "test_acc_net2"} <= set(r)
        assert not any("*" in key for key in r)  # nothing here knows labels of training images
    assert records[-1]["contrastive"] > 0 and records[-1]["prototype"] > 0
    assert records[0]["contrastive"] == records[2]["contrastive"] == 0  # ">" warm-up + start
    assert [r["lr"] for r in records] == [C.cosine_lr(e, 0.05, 800) for e in range(4)]


def test_run_same_seed_same_numbers(photos, finished, tmp_path):
    assert C.main(arguments(photos, tmp_path / "again")) == 0
    assert C.main(arguments(photos, tmp_path / "other", "--seed", "1")) == 0
    assert metrics(tmp_path / "again") == metrics(finished) != metrics(tmp_path / "other")


def test_run_never_sees_folder_names(photos, tmp_path):
    """The same images, below folders whose names say the wrong class: the same numbers."""
    for kind, shift in (("right", 0), ("wrong", 1)):
        for i, path in enumerate(sorted((photos / "train").iterdir())):
            own = list(COLOURS).index(path.stem[2:])
            target = tmp_path / kind / "train" / f"{i:02}" / list(COLOURS)[own - shift]
            target.mkdir(parents=True)
            (target / path.name).write_bytes(path.read_bytes())
        args = arguments(photos, tmp_path / f"run {kind}", "--data-dir", str(tmp_path / kind))
        assert C.main(args) == 0
    assert metrics(tmp_path / "run right") == metrics(tmp_path / "run wrong")
    assert "test_acc" not in metrics(tmp_path / "run right")[-1]  # no test/: no accuracy


def test_classifier_predicts(finished, photos):
    saved = torch.load(finished / "model.pt", weights_only=True)
    classify = C.Classifier(finished / "model.pt")
    image = Image.open(photos / "test" / "red" / "0.png")
    batch = torch.stack([classify.prepare(image)] * 2)
    probs = classify(batch)
    assert classify.class_names == ["red", "green", "blue"] and batch.shape == (2, 3, 8, 8)
    nets = [C.CoRegNet(3, 3, 8, 4, 8) for _ in range(2)]
    for net, state in zip(nets, saved["networks"]):
        net.load_state_dict(state)
        net.eval()
    floats = (batch / 255 - saved["mean"]) / saved["std"]
    expected = sum(net(floats)[0] for net in nets).div(2).softmax(1)
    torch.testing.assert_close(probs, expected.detach(), atol=1e-5, rtol=1e-5)


def test_predict_writes_csv(finished, photos, tmp_path, capsys):
    folder = tmp_path / "füße und mehr"
    for name in ("a b.png", "deep/er/ü.PNG"):
        paint(folder / name, COLOURS["red"])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    args = ["--predict", str(folder), "--model", str(finished / "model.pt"), "--output-dir"]
    assert C.main([*args, str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "1 of 3" in captured.err and "broken.jpg" in captured.err
    text = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["path"] for row in rows] == [str(folder / "a b.png"), str(folder / "deep/er/ü.PNG")]
    for row in rows:
        shares = [float(row[f"confidence{i}"]) for i in ("", "_2", "_3")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-4)
        assert {row["label"], row["label_2"], row["label_3"]} == set(COLOURS)
        classify = C.Classifier(finished / "model.pt")
        probs = classify(classify.prepare(C.open_image(row["path"]))[None])[0]
        assert row["label"] == classify.class_names[probs.argmax()]
    assert C.main([*args, "-"]) == 0 and capsys.readouterr().out == text
    assert C.main([*args, str(tmp_path / "out")]) == 2  # would replace a file
    one_line(capsys, "predictions.csv", "--overwrite")
    single = ["--predict", str(folder / "a b.png"), *args[2:], "-"]
    assert C.main(single) == 0 and capsys.readouterr().out.splitlines() == text.splitlines()[:2]


@pytest.mark.parametrize("content", [None, b"", b"no model", "cut"])
def test_predict_bad_model(finished, photos, tmp_path, capsys, content):
    model = tmp_path / "model.pt"
    if content is not None:
        whole = (finished / "model.pt").read_bytes()
        model.write_bytes(whole[:len(whole) // 2] if content == "cut" else content)
    assert C.main(["--predict", str(photos), "--model", str(model), "--output-dir", "-"]) == 2
    one_line(capsys, "--model", model)


def test_predict_nothing_to_read(finished, tmp_path, capsys):
    args = ["--predict", str(tmp_path / "nowhere"), "--model", str(finished / "model.pt")]
    assert C.main([*args, "--output-dir", "-"]) == 2
    one_line(capsys, "--predict", "nowhere")


@pytest.mark.parametrize("more, phase", [
    (["--method", "pce"], "pce"), (["--method", "hard"], "hard"), (["--method", "distill"], "distill"),
    (["--candidates", "soft"], "distill"), (["--ablate", "co-pl,mixup"], "co-train"),
    (["--ablate", "prototype,contrastive,multi-prompt"], "co-train"), (["--ablate", "gmm"], "co-train"),
    (["--ablate", "alignment"], "co-train"), (["--prior", "clip"], "co-train")])
def test_run_variants(photos, finished, tmp_path, more, phase):
    assert C.main(arguments(photos, tmp_path / "run", *more)) == 0
    records = metrics(tmp_path / "run")
    assert records[-1]["phase"] == phase and records != metrics(finished)
    last = records[-1]
    assert math.isfinite(last["loss"]) and (last["clean"] == 36) == ("gmm" in more)
    if "contrastive" in str(more):
        assert last["prototype"] == last["contrastive"] == 0
    if phase in ("hard", "distill"):
        assert all(r["entropy"] == 0 and r["set"] > 0 for r in records)


def test_run_true_labels_only_when_asked(photos, tmp_path, capsys):
    """`flip` and `supervised` take the names of train/<class>/, and say so."""
    for path in (photos / "train").iterdir():
        target = tmp_path / "data" / "train" / path.stem[2:] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    base = ["--dataset", "folder", "--data-dir", str(tmp_path / "data"), *SMALL, "--annotator", "flip"]
    flip = [*base, "--noise-rate", "0", "--partial-rate", "0", "--output-dir", str(tmp_path / "run")]
    assert C.main(flip) == 0
    out = capsys.readouterr().out
    assert "TRUE labels" in out and "candidate sets with the true label* %    100.00" in out
    assert C.main([*flip, "--method", "supervised", "--overwrite"]) == 0
    assert "upper bound" in capsys.readouterr().out
    assert C.main([*base, "--data-dir", str(photos), "--classes", "red,green,blue"]) == 2
    one_line(capsys, "train", "red")


def stop_in_epoch(monkeypatch, number, error):
    """Let an error strike in the middle of an epoch, after steps of both networks."""
    real, calls = C.mean_terms, []

    def mean_terms(steps, epoch):
        calls.append(epoch)
        result = real(steps, epoch)
        if len(calls) == number:
            raise error
        return result
    monkeypatch.setattr(C, "mean_terms", mean_terms)


@pytest.mark.parametrize("save_every", ["0", "3"])
def test_resume_after_interrupt(photos, finished, tmp_path, monkeypatch, capsys, save_every):
    args = arguments(photos, tmp_path / "run", "--save-every", save_every)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 6, KeyboardInterrupt())  # epoch 3, after network 2
        assert C.main(args) == 130
    one_line(capsys, "interrupted", f"--resume {tmp_path / 'run'}")
    assert len(metrics(tmp_path / "run")) == 2 and not (tmp_path / "run" / "model.pt").exists()
    assert C.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True)["networks"]
                    for folder in (tmp_path / "run", finished))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs) for name in a)


def test_resume_newest_unfinished(photos, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [a for a in arguments(photos, "x") if a not in ("--output-dir", "x")]
    for _ in range(2):  # runs/folder, and then runs/folder-2
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, 5, KeyboardInterrupt())
            assert C.main(args) == 130
    assert C.main(["--dataset", "digits", "--resume"]) == 2
    assert "unfinished run of digits" in capsys.readouterr().err
    assert C.main(["--dataset", "folder", "--resume"]) == 0
    assert metrics(tmp_path / "runs/folder-2") == metrics(finished)
    assert not (tmp_path / "runs/folder/model.pt").exists()
    assert C.main(["--dataset", "folder", "--resume"]) == 0
    assert metrics(tmp_path / "runs/folder") == metrics(finished)
    assert C.main(["--dataset", "folder", "--resume"]) == 2


def test_resume_refuses_conflicts(photos, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 3, KeyboardInterrupt())
        assert C.main(arguments(photos, tmp_path / "run")) == 130
    capsys.readouterr()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for flag, value in (("--lr", "0.5"), ("--epochs", "9"), ("--dataset", "digits")):
        assert C.main(["--resume", str(tmp_path / "run"), flag, value]) == 2
        one_line(capsys, flag, value)
    votes = np.load(photos / "votes.npz")["votes"]
    np.savez(tmp_path / "other.npz", votes=(votes + 1) % 3)
    with monkeypatch.context() as patch:
        patch.setattr(C, "FREE", C.FREE | {"annotations"})  # as if the file itself had changed
        assert C.main(["--resume", str(tmp_path / "run"), "--annotations",
                       str(tmp_path / "other.npz")]) == 2
    one_line(capsys, "--resume", "annotations")
    holder = C.lock(tmp_path / "run")
    assert C.main(["--resume", str(tmp_path / "run")]) == 2
    one_line(capsys, "another process")
    holder.close()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "bit", "other"])
def test_resume_damaged_checkpoint(finished, tmp_path, capsys, damage):
    (tmp_path / "run").mkdir()
    whole = bytearray((finished / "checkpoint.pt").read_bytes())
    whole[len(whole) // 2] ^= 255 * (damage == "bit")
    content = {"empty": b"", "cut": whole[:-100], "bit": whole[:len(whole) // 2 + 9],
               "other": (finished / "model.pt").read_bytes()}
    if damage != "gone":
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content[damage])
    assert C.main(["--resume", str(tmp_path / "run")]) == 2
    one_line(capsys, "--resume", tmp_path / "run")


def test_run_full_disk_keeps_checkpoint(photos, finished, tmp_path, monkeypatch, capsys):
    real, count = C.write_atomically, []

    def full(path, content):
        count.append(path)
        if len(count) > 6:  # two labels, config, two at the start, then one an epoch
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(C, "write_atomically", full)
        assert C.main(arguments(photos, tmp_path / "run")) == 1
    one_line(capsys, "No space left", "--resume")
    assert C.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)


def test_train_loss_not_finite(photos, tmp_path, capsys):
    assert C.main(arguments(photos, tmp_path / "run", "--lr", "1e30")) == 1
    one_line(capsys, "not finite", "epoch", "step", "--lr")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["records"] == []


def test_resume_after_kill(photos, tmp_path, monkeypatch):
    """SIGKILL at random moments, five times; the metrics are those of a run left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coreg"])
    run, quiet, random = tmp_path / "run", tmp_path / "quiet", np.random.default_rng(0)

    def lines(): return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0

    def start(*args):
        process = context.Process(target=C.main, args=(args,))
        process.start()
        return process

    for kill in range(5):
        begun = (run / "checkpoint.pt").exists()
        process = start("--resume", str(run)) if begun else start(*arguments(
            photos, run, "--epochs", "14", "--save-every", "2"))
        while process.is_alive() and lines() < 2 * kill:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        assert process.is_alive()
        process.kill()
        process.join()
    start("--resume", str(run)).join(120)
    start(*arguments(photos, quiet, "--epochs", "14")).join(120)
    assert len(metrics(run)) == 14 and metrics(run) == metrics(quiet)


def test_digits_from_annotation_to_metrics(tmp_path, monkeypatch, capsys):
    """The embedded default in small: TinyCLIP hardly trained, three epochs."""
    monkeypatch.setattr(C, "TINY_STEPS", 30)
    monkeypatch.setattr(C, "TINY_IMAGES", 4)
    args = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run"), "--epochs",
            "3", "--warm-up", "2", "--width", "4", "--start-contrastive", "0", "--num-samples", "200"]
    assert C.main(args) == 0
    out = capsys.readouterr().out
    for text in ("pre-training", "written to", "zero-shot %, best single template*",
                 "zero-shot %, mean of templates", "candidate sets with the true label* %",
                 "candidate sets, mean size", "after warm-up", "network 1", "network 2", "both"):
        assert text in out
    last = metrics(tmp_path / "run")[-1]
    assert {"clean_precision*", "pseudo_label_acc*", "test_acc"} <= set(last) and last["clean"] > 0
    monkeypatch.setattr(C, "load_tiny", None)  # not needed again, whatever the seed
    cached = [*args, "--seed", "5", "--overwrite", "--candidates", "argmax"]
    assert C.main(cached) == 0 and "read from" in capsys.readouterr().out
    with np.load(next((tmp_path / "data/annotations").glob("*.npz")), allow_pickle=False) as file:
        assert file["probs"].shape == (12, 200, 10) and file["probs"].dtype == np.float16
    path = str(next((tmp_path / "data/annotations").glob("*.npz")))
    assert C.main([*args, "--overwrite", "--annotations", path]) == 0  # is valid input itself
    monkeypatch.setattr(C, "load_tiny", lambda *_: (_ for _ in ()).throw(C.CoregError("asked")))
    for more in (["--num-templates", "3"], ["--num-samples", "201"]):  # other questions: asked anew
        assert C.main([*args, "--overwrite", *more]) == 2
        one_line(capsys, "asked")
    Path(path).write_bytes(b"cut")
    assert C.main([*args, "--overwrite"]) == 2 and "cannot be read" in capsys.readouterr().out


def test_net_bf16_is_close():
    torch.manual_seed(0)
    net, images = C.CoRegNet(5, 1, 8, 16), torch.randn(6, 1, 8, 8)
    (logits, z), net.bf16 = net(images), True
    half_logits, half_z = net(images)
    assert half_logits.dtype == half_z.dtype == torch.float32 and not torch.equal(z, half_z)
    torch.testing.assert_close(logits, half_logits, atol=0.1, rtol=0.05)
    torch.testing.assert_close(half_z.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("width", [4, 12])
def test_net_narrow_channels_last_backward(width):
    """Narrow strided 1x1 convolutions once corrupted memory in the backward pass."""
    net = C.CoRegNet(3, 3, 32, width).to(memory_format=torch.channels_last)
    for n in (30, 29, 27, 28) * 2:
        net(torch.randn(n, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
