"""`mfp bench`: it judges before it measures, and what it prints is whole. No time is asserted here."""

import functools
import itertools

import pytest
import torch
from rich.console import Console

import mfp
from mfp import bench
from mfp.bench import engines, jobs, layers, measure, overhead, results, table
from mfp.bench.oracle import Sample
from mfp.criteria import criterion
from mfp.errors import MfpError
from mfp.train.models import CifarResNet, build_model


@pytest.fixture(scope="module")
def small_jobs():
    torch.manual_seed(0)
    return jobs.Jobs(build_model("resnet20", 10), 0.4, 32)


@pytest.fixture
def bench_rows(tmp_path, capsys, monkeypatch):
    """Runs `mfp bench`; what its result file has, and what it printed."""

    def run(*arguments):
        for name in bench.SWITCHES:
            monkeypatch.delenv(name, raising=False)
        bench.main([*arguments, "--json", str(tmp_path / "bench.json")])
        found = results.read(tmp_path / "bench.json")
        assert found["command"] == " ".join(["mfp bench", *arguments])
        return found, capsys.readouterr().out

    return run


def test_the_table_is_whole(bench_rows, monkeypatch):
    from mfp import _C

    monkeypatch.setattr(table, "SECONDS_PER_JOB", 0.01)
    monkeypatch.setattr(_C, "measure_limits", functools.cache(_C.measure_limits))  # once, not before each job
    report, printed = bench_rows("--arch", "resnet20")
    by_job = {}
    for row in report["rows"]:
        by_job.setdefault(row["job"], []).append(row["who"])
        assert row["seconds"] > 0
        assert row["share_of_limit"] > 0
    assert set(mfp.PAPER_CRITERIA) < set(by_job)
    assert all(len(contestants) > 1 for contestants in by_job.values())
    assert {(row["arch"], row["filters"], row["rate"]) for row in report["rows"]} == {("resnet20", 688, 0.4)}
    assert "G additions/s" in printed
    assert all(job.split(",")[0] in printed for job in by_job)


def test_overhead_adds_up(bench_rows, monkeypatch):
    monkeypatch.setattr(overhead, "SECONDS", 0.01)
    report, printed = bench_rows("--overhead", "--arch", "resnet20", "--batch", "2")
    seconds = {row["part"]: row["seconds"] for row in report["rows"]}
    plain, soft, hard = (seconds[f"epoch, {mode}"] for mode in ("plain", "soft", "hard"))
    assert plain == pytest.approx(5004 * (128 * seconds["passes"] + seconds["plain"]))
    assert soft - plain == pytest.approx(seconds["pruning"])
    assert hard - plain == pytest.approx(seconds["pruning"] + 5004 * (seconds["masked"] - seconds["plain"]))
    assert "hard pruning" in printed


def test_wrong_results_are_not_timed(small_jobs):
    def broken() -> None:
        raise MfpError("wrong")

    calls = []
    contestant = measure.Contestant("wrong", lambda: calls.append(1), lambda _: broken())
    with pytest.raises(MfpError, match="wrong"):
        measure.best_times([contestant], 1.0)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [*mfp.PAPER_CRITERIA, "weighted_hybrid", "l3_distance"])
def test_scores_off_by_a_little_fail_the_check(small_jobs, name):
    scores = mfp.score_filters(small_jobs.plan, (name,))[name]
    check = small_jobs.sample.check([criterion(name)], 1e-5)
    check([scores])
    with pytest.raises(MfpError, match=f"{name}: relative error"):
        check([scores * 1.0001])
    with pytest.raises(MfpError, match="relative error nan"):
        check([scores * float("nan")])


def test_products_off_by_a_little_fail_the_check(small_jobs):
    ours, loop = small_jobs.gradients().contestants
    for contestant, error in ((ours, 1e-4), (loop, 1e-2)):
        scores = contestant.run()
        contestant.check(scores)
        for wrong in (scores * (1 + error), scores * float("nan")):
            with pytest.raises(MfpError, match="taylor: relative error"):
                contestant.check(wrong)


def test_every_layer_is_sampled(small_jobs):
    layers = {layer for layer, _ in small_jobs.sample.filters}
    assert layers == set(range(len(small_jobs.weights)))
    weights = [torch.randn(5, 3), torch.randn(4, 2, 3, 3)]
    sample = Sample(weights)
    flat = torch.cat([torch.arange(5), torch.arange(4)])
    assert [int(flat[i]) for i in sample.index] == [j for _, j in sample.filters]


def test_contestants_of_a_job_are_all_checked(small_jobs):
    checked = []
    for job in small_jobs.all():
        for contestant in job.contestants:
            contestant.prepare()
            contestant.check(contestant.run())
            checked.append((job.name, contestant.name))
    assert len(checked) > 20
    assert ("l2_distance", "torch.cdist loop") in checked


def test_masking_checks_notice_a_wrong_row(small_jobs):
    job = small_jobs.masking()
    ours = job.contestants[0]
    ours.prepare()
    with pytest.raises(MfpError, match="masking"):
        ours.check(None)  # nothing was masked
    ours.run()
    small_jobs.weights[3][:] = 0
    with pytest.raises(MfpError, match="masking"):
        ours.check(None)
    ours.prepare()


def test_without_the_compiled_part_it_says_so(monkeypatch):
    monkeypatch.setattr(measure.backend, "build_info", lambda: None)
    with pytest.raises(MfpError, match="compiled kernels"):
        measure.machine()


def test_engines_side_by_side(bench_rows, monkeypatch):
    monkeypatch.setattr(engines, "build_model", lambda name, classes: CifarResNet(8, classes))
    for name, value in {"SIZE": 32, "ROUNDS": 1, "SECONDS": 0.01, "FORMS": ("coupled", "index")}.items():
        monkeypatch.setattr(engines, name, value)
    report, printed = bench_rows(
        "--engines", "onnxruntime,mfp", "--arch", "resnet20", "--batch", "1,2", "--rate", "0.6"
    )
    rows = {(row["engine"], row["residual"], row["batch"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 2 * 2 * 2
    assert all(row["dense_ms"] > 0 and row["compact_ms"] > 0 for row in rows.values())
    kept = {key[:2]: row["flops_kept"] for key, row in rows.items()}
    assert kept["mfp", "index"] < kept["onnxruntime", "index"] < 1  # zero filters for plain additions
    assert kept["onnxruntime", "coupled"] == kept["mfp", "coupled"]
    assert "fastest" in printed
    with pytest.raises(MfpError, match="engine must be one of"):
        bench.main(["--engines", "tvm", "--arch", "resnet20"])


def test_training_steps_of_the_networks(monkeypatch, capsys):
    from mfp.bench import training

    monkeypatch.setattr(training, "SECONDS", 0.0)
    monkeypatch.setattr(training, "RESIDUAL", ("index", "coupled"))
    report = training.measure("resnet20", 0.4, 4, Console(quiet=True))
    rows = {row["network"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "masked", "index", "coupled"]
    assert rows["dense"]["flops"] == rows["masked"]["flops"] > rows["coupled"]["flops"] > rows["index"]["flops"]
    assert all(row["seconds"] == row["forward"] + row["backward"] + row["step"] > 0 for row in rows.values())
    training.print_table(report, Console(width=120))
    assert "smaller, coupled" in capsys.readouterr().out


def test_the_command_names_the_switches_that_change_speeds(monkeypatch):
    for name in bench.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MFP_CPU_ISA", "avx2")
    command = bench._command(["--arch", "resnet18", "--json", "file"])
    assert command == "MFP_CPU_ISA=avx2 mfp bench --arch resnet18"


def test_layer_by_layer(bench_rows, monkeypatch):
    monkeypatch.setattr(layers, "build_model", lambda name, classes: CifarResNet(8, classes))
    monkeypatch.setattr(layers, "SIZE", 32)
    monkeypatch.setattr(layers, "CALLS", 2)
    monkeypatch.setattr(layers, "ROUNDS", 1)
    report, printed = bench_rows("--layers", "--arch", "resnet20", "--batch", "1,2", "--residual", "keep")
    for batch, form in itertools.product((1, 2), ("dense", "keep")):
        rows = [row for row in report["rows"] if (row["batch"], row["form"]) == (batch, form)]
        convs = [row for row in rows if row["convolution"]]
        assert len(convs) == 7
        assert all(row["gmacs"] > 0 for row in convs)
        assert all(row["layer"] in printed for row in convs)
        assert {row["convolution"] for row in convs} == {"3x3 on 32x32", "3x3 on 16x16", "3x3 on 8x8"}
        assert all(row[key] > 0 for row in convs for key in ("ms", "onnxruntime", "openvino"))
        others = {row["layer"] for row in rows if not row["ms"]}
        assert {"ONNX Runtime: Gemm", "OpenVINO: FullyConnected"} <= others
        assert not others & {"ONNX Runtime: Conv", "OpenVINO: Convolution"}  # all of them found their layers
    assert "of the peak" in printed
