from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_safetensors

from mfp import atomic
from mfp.atomic import WriteError
from mfp.train import checkpoints
from mfp.train.checkpoints import (
    CheckpointError,
    checkpoint_files,
    digest_of,
    load_checkpoint,
    load_newest,
    pack,
    save_checkpoint,
    unpack,
)


def example_state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "epoch": step,
        "model": {"conv.weight": torch.randn(4, 3, generator=generator), "steps": torch.tensor(step)},
        "optimizer": {
            "state": {0: {"momentum": torch.randn(5, generator=generator)}, 1: {}},
            "lr": 0.1 + step,
        },
        "half": torch.randn(3, generator=generator).bfloat16(),
        "keep": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "history": [{"loss": float("inf"), "criterion": None, "name": "ü"}],
    }


def newest_step(directory: Path) -> int:
    checkpoint = load_newest(directory)
    assert digest_of(checkpoint.state) == digest_of(example_state(checkpoint.step))
    return checkpoint.step


def test_state_round_trips(tmp_path):
    path = save_checkpoint(tmp_path, 3, example_state(3))
    loaded = load_checkpoint(path)
    assert loaded.step == 3
    assert digest_of(loaded.state) == digest_of(example_state(3)) != digest_of(example_state(4))
    assert list(loaded.state["optimizer"]["state"]) == [0, 1]
    assert loaded.state["half"].dtype == torch.bfloat16


def test_shared_and_strided_tensors_are_stored():
    base = torch.arange(12.0).reshape(3, 4)
    plain, tensors = pack({"a": base, "b": base.t(), "c": base[1]})
    back = unpack(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(back["b"], base.t())
    assert torch.equal(back["c"], base[1])
    with pytest.raises(TypeError, match="cannot store /a/0, a set"):
        pack({"a": [set()]})


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 5, 9):
        save_checkpoint(tmp_path, step, example_state(step))
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "step-00000005.safetensors",
        "step-00000009.safetensors",
    ]
    save_checkpoint(tmp_path, 7, example_state(7))  # a run that went back to 5
    assert [path.name[11:13] for path in checkpoint_files(tmp_path)] == ["05", "07"]


def test_a_damaged_newest_falls_back_and_says_so(tmp_path):
    save_checkpoint(tmp_path, 1, example_state(1))
    newest = save_checkpoint(tmp_path, 2, example_state(2))
    newest.write_bytes(newest.read_bytes()[:-7])
    said = []
    assert load_newest(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert "step-00000002.safetensors is no checkpoint of mfp, or it is damaged" in said[0]
    assert "going back to step-00000001" in said[0]
    for path in checkpoint_files(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used"):
        load_newest(tmp_path, said.append)
    assert load_newest(tmp_path / "nowhere") is None


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.arange(6), "b": 1.5})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        try:
            loaded = load_checkpoint(path).state
        except CheckpointError:
            continue
        # a change of the header's padding or spaces can be without meaning
        assert digest_of(loaded) == digest_of({"a": torch.arange(6), "b": 1.5})


def test_pieces_of_two_checkpoints_are_refused(tmp_path):
    first, second = (save_checkpoint(tmp_path, step, example_state(step)).read_bytes() for step in (1, 2))
    starts = [8 + int.from_bytes(data[:8], "little") for data in (first, second)]
    for head, tail in ((first[: starts[0]], second[starts[1] :]), (second[: starts[1]], first[starts[0] :])):
        (tmp_path / "mixed.safetensors").write_bytes(head + tail)
        with pytest.raises(CheckpointError, match="does not have the digest"):
            load_checkpoint(tmp_path / "mixed.safetensors")


def test_a_later_format_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({}, {"mfp": json.dumps({"format": 9, "step": 1, "digest": "", "state": 1})}))
    with pytest.raises(CheckpointError, match="has format 9, this mfp reads 1"):
        load_checkpoint(path)
    path.write_bytes(to_safetensors({"a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="is no checkpoint of mfp"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot read .*missing"):
        load_checkpoint(tmp_path / "missing")


class Faults:
    """Stands in for `os` inside the modules: the N-th file operation fails, once or from then on."""

    names = ("open", "write", "fsync", "close", "replace", "unlink")

    def __init__(self, at: int, kind: int | str, persistent: bool) -> None:
        self.at, self.kind, self.persistent, self.count = at, kind, persistent, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.names:
            return real

        def operation(*args, **kwargs):
            self.count += 1
            if self.count == self.at or (self.persistent and self.count > self.at):
                if self.kind == "short":
                    return (
                        real(args[0], args[1][: max(1, len(args[1]) // 3)])
                        if name == "write"
                        else real(*args, **kwargs)
                    )
                if name == "close":
                    real(*args)
                raise OSError(self.kind, os.strerror(self.kind))
            return real(*args, **kwargs)

        return operation


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, errno.EDQUOT, "short"])
@pytest.mark.parametrize("before", [(), (4,), (2, 3), (1, 2)])  # first save, overwrite, one before, rotation
def test_any_file_operation_may_fail(tmp_path, monkeypatch, before, kind, persistent):
    failures = 0
    for at in range(1, 100):
        directory = tmp_path / str(at)
        for step in before:
            save_checkpoint(directory, step, example_state(step))
        faults = Faults(at, kind, persistent)
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "os", faults)
            patch.setattr(checkpoints, "os", faults)
            try:
                save_checkpoint(directory, 4, example_state(4))
                message = ""
            except WriteError as error:
                message = str(error)
        saved = not message
        failures += not saved
        assert saved or (str(directory) in message and os.strerror(kind) in message)
        if saved or not before:
            assert load_newest(directory) is None or newest_step(directory) == 4
            assert not saved or newest_step(directory) == 4
        else:
            assert newest_step(directory) in (max(before), 4)
        save_checkpoint(directory, 5, example_state(5))  # and life goes on
        assert newest_step(directory) == 5
        assert not list(directory.glob("*.tmp"))
        if faults.count < at:
            break
    assert at >= 8  # open, write, fsync, close, rename, and three for the directory
    assert failures == 0 if kind == "short" else failures >= 6


def test_power_loss_at_any_moment(tmp_path, monkeypatch):
    """Every prefix of the operations, with what was not flushed lost, leaves a directory that loads."""
    log = []
    names = {}

    class Recorder:
        def __getattr__(self, name):
            real = getattr(os, name)
            if name not in Faults.names:
                return real

            def operation(*args, **kwargs):
                result = real(*args, **kwargs)
                if name == "open":
                    names[result] = Path(args[0])
                elif name == "write":
                    log.append(("write", names[args[0]], bytes(args[1][:result])))
                elif name == "fsync":
                    log.append(("fsync", names[args[0]]))
                elif name in ("replace", "unlink"):
                    log.append((name, *map(Path, args)))
                return result

            return operation

    recorder = Recorder()
    monkeypatch.setattr(atomic, "os", recorder)
    monkeypatch.setattr(checkpoints, "os", recorder)
    ends = {}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run", step, example_state(step))
        ends[len(log)] = step
    monkeypatch.undo()
    for cut in range(len(log) + 1):
        # written data counts only once its file was flushed; a rename may or may not have got to the disk
        # before the directory was flushed, and both are tried; deletions count at once, our worst case
        for lost in (True, False):
            written, durable, names_on_disk, pending = {}, {}, {}, []
            for entry in log[:cut]:
                if entry[0] == "write":
                    written[entry[1]] = written.get(entry[1], b"") + entry[2]
                elif entry[0] == "fsync" and entry[1] == tmp_path / "run":
                    for source, target in pending:
                        names_on_disk[target] = durable.get(source, b"")
                    pending = []
                elif entry[0] == "fsync":
                    durable[entry[1]] = written.pop(entry[1])
                elif entry[0] == "replace":
                    pending.append(entry[1:])
                else:
                    names_on_disk.pop(entry[1], None)
            if not lost:
                names_on_disk.update({target: durable.get(source, b"") for source, target in pending})
            rebuilt = tmp_path / f"{cut}-{lost}"
            rebuilt.mkdir()
            for path, data in names_on_disk.items():
                (rebuilt / path.name).write_bytes(data)
            committed = max([step for end, step in ends.items() if end <= cut], default=0)
            found = load_newest(rebuilt)
            assert (found.step if found else 0) >= committed
            if found:
                newest_step(rebuilt)


def test_a_real_limit_of_the_file_size(tmp_path):
    save_checkpoint(tmp_path, 1, example_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(WriteError, match=r"cannot write .* \(\d[\d,]+ bytes\): File too large"):
            save_checkpoint(tmp_path, 2, {"big": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert newest_step(tmp_path) == 1


def test_killed_while_saving(tmp_path):
    """At moments spread over four saves, whatever a save takes on this machine at this time."""
    rng = random.Random(0)
    start = time.monotonic()
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, example_state(step))
    one_save = (time.monotonic() - start) / 5
    last, in_write = 5, 0
    for _ in range(100):
        left_behind = set(tmp_path.glob("*.tmp"))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, last.to_bytes(4, "little"))
                for step in itertools.count(last + 1):
                    save_checkpoint(tmp_path, step, example_state(step))
                    os.write(writer, step.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.read(4)
            time.sleep(rng.uniform(0, 4 * one_save))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said += pipe.read()
        last = int.from_bytes(said[-4:], "little")
        in_write += bool(set(tmp_path.glob("*.tmp")) - left_behind)
        assert newest_step(tmp_path) in (last, last + 1)
        last = newest_step(tmp_path)
    assert last > 20
    assert in_write > 0
