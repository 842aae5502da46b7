"""`stablesr evaluate`, from a folder of pairs to a report."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from stablesr_kit.errors import CheckpointError, ImageError
from stablesr_kit.evaluation.methods import Given, Method, Settings, baselines
from stablesr_kit.evaluation.metrics import MetricSettings
from stablesr_kit.evaluation.protocols import PROTOCOLS, find_sets
from stablesr_kit.evaluation.report import mean_of
from stablesr_kit.evaluation.resampling import resize_bicubic_matlab
from stablesr_kit.evaluation.runner import AS_GIVEN, Evaluation, load_metrics
from tests.helpers.cli_runs import error_lines, stablesr, stablesr_in_two_processes
from tests.helpers.tiny import tiny_codeformer

Pixels = NDArray[np.uint8]


def save(pixels: Pixels, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def truths(count: int) -> Iterator[tuple[str, Pixels]]:
    """Pieces of a photograph, 64 x 48."""
    for number in range(count):
        yield f"{number:02d}", data.astronaut()[40 + 16 * number : 104 + 16 * number, 180:228]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder with a set of three pairs."""
    folder = tmp_path / "data"
    for name, truth in truths(3):
        save(truth, folder / "Tiny_HR" / f"{name}.png")
        save(resize_bicubic_matlab(truth, 16, 12), folder / "Tiny_LRx4" / f"{name}x4.png")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What another program made of the pairs: nothing but grey."""
    for name, truth in truths(3):
        save(np.full_like(truth, 128), tmp_path / "theirs" / f"{name}.png")
    return tmp_path / "theirs"


@pytest.fixture(autouse=True)
def _offline(no_network: None) -> None:
    """Metrics whose weights are not here are left out at once."""


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return content


def row_of(report: dict[str, Any], method: str, set_name: str = "Tiny") -> dict[str, Any]:
    (row,) = (row for row in report["rows"] if (row["method"], row["set"]) == (method, set_name))
    metrics: dict[str, Any] = row["metrics"]
    return metrics


def test_methods_are_compared_by_a_protocol(pairs: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = stablesr("evaluate", pairs, "--protocol", "classic-sr", "--method", f"theirs={results}", "-o", out)
    assert ran.exit_code == 0
    assert "note: LPIPS (alex) is not measured: it needs lpips_alex.safetensors" in ran.stderr
    assert re.search(r"^Tiny +bicubic +\d+\.\d\d ", ran.stdout, re.MULTILINE)

    report = report_of(out)
    assert report["protocol"] == "classic-sr"
    assert [row["method"] for row in report["rows"]] == ["bicubic", "lanczos", "theirs"]
    psnr = row_of(report, "bicubic")["psnr"]
    assert psnr["n"] == 3 and psnr["low"] < psnr["mean"] < psnr["high"]
    assert psnr["mean"] > row_of(report, "theirs")["psnr"]["mean"]
    assert "LQ-PSNR has no finite value for 3 of truth on Tiny: 00, 01, 02" in report["notes"]
    assert {"lpips-alex", "dists", "niqe"} <= report["absent"].keys()
    assert len(report["pictures"]) == 12
    assert all((out / one["result"]).is_file() for one in report["pictures"])
    (difference,) = (
        one
        for one in report["differences"]
        if (one["metric"], one["first"], one["second"]) == ("psnr", "bicubic", "theirs")
    )
    assert difference["mean"] == pytest.approx(psnr["mean"] - row_of(report, "theirs")["psnr"]["mean"], abs=1e-5)
    assert any("Tiny is none of the sets of classic-sr" in note for note in report["notes"])
    assert report["command"].startswith("stablesr evaluate ") and report["command"].endswith(" -o OUT")
    assert report["versions"]["stablesr-kit"] and len(report["data"]["Tiny"]["00"]["hq"]) == 64


def test_tables_are_written_for_programs_readers_and_browsers(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stablesr("evaluate", pairs, "--protocol", "classic-sr", "--method", "flat=lanczos", "-o", out)
    stablesr("evaluate", pairs, "--protocol", "classic-sr", "--method", "known=nonblind", "-o", out)
    with (out / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {"measured", "as quoted from Kim et al. 2016 on"} <= {line["source"] for line in lines}
    assert [line["n"] for line in lines if (line["method"], line["metric"]) == ("bicubic", "psnr")] == ["3", ""]
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "| method | PSNR ↑ |" in markdown and re.search(r"\*\*\d+\.\d\d\*\*", markdown)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the page must need nothing from elsewhere"
    assert "@@" not in page and page.count("<svg") == 1 and "currentColor" in page
    assert re.search(r'<svg[^>]* style="--width: \d{3,4}px"', page), "a figure of one metric is not as wide as the page"
    shown = json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    views = shown["groups"][0]["pictures"][0]["views"]
    assert [view["title"] for view in views] == ["bicubic", "lanczos", "known", "truth"]
    assert all(view["image"].startswith("data:image/webp;base64,") for view in views)


def test_the_same_command_gives_the_same_bytes(pairs: Path, model: Path, tmp_path: Path) -> None:
    reports = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        arguments = ["--method", f"tiny={model}", "--limit", 2, "--study", "seeds", "-o", folder]
        assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
        reports.append([(folder / name).read_bytes() for name in ("report.json", "index.html")])
    assert reports[0] == reports[1]


class Counting:
    """A method that counts, and can be told to fail."""

    def __init__(self) -> None:
        self.restored: list[str] = []
        self.method = Method(name="counting", what="counts", identity="1", load=lambda: self)

    def __call__(self, given: Given, _: Settings) -> Pixels:
        self.restored.append(given.pair.name)
        return resize_bicubic_matlab(given.lq, given.height, given.width)


def an_evaluation(folder: Path, told: list[str] | None = None) -> Evaluation:
    metrics = load_metrics(["psnr", "ssim"], MetricSettings())
    return Evaluation(folder, PROTOCOLS["classic-sr"], metrics, tell=(told if told is not None else []).append)


def test_an_evaluation_that_was_killed_goes_on_with_what_is_not_done(pairs: Path, tmp_path: Path) -> None:
    counting = Counting()
    sets = find_sets(pairs, PROTOCOLS["classic-sr"])
    killed = an_evaluation(tmp_path / "out")
    running = killed.run(killed.tasks(sets, [counting.method]))
    next(running), next(running)
    with killed.journal.open("a") as journal:
        journal.write('{"key": "cut of')  # while the third was recorded
    assert counting.restored == ["00", "01"]

    again = an_evaluation(tmp_path / "out")
    records = list(again.run(again.tasks(sets, [counting.method])))
    assert counting.restored == ["00", "01", "02"]
    assert [record.picture for record in records] == ["00", "01", "02"]
    untouched = an_evaluation(tmp_path / "out")
    assert list(untouched.run(untouched.tasks(sets, [counting.method]))) == records
    assert len(counting.restored) == 3


def test_what_changed_is_done_again_and_nothing_else(pairs: Path, tmp_path: Path) -> None:
    counting = Counting()
    sets = find_sets(pairs, PROTOCOLS["classic-sr"])

    def run(method: Method = counting.method) -> list[str]:
        counting.restored.clear()
        evaluation = an_evaluation(tmp_path / "out")
        list(evaluation.run(evaluation.tasks(sets, [method])))
        return list(counting.restored)

    assert run() == ["00", "01", "02"]
    evaluation = an_evaluation(tmp_path / "out")
    evaluation.result_path("Tiny", "counting", "01").unlink()
    assert run() == ["01"]
    save(np.zeros((16, 12, 3), np.uint8), pairs / "Tiny_LRx4" / "02x4.png")
    assert run() == ["02"]
    assert run(Method(**{**vars(counting.method), "identity": "2"})) == ["00", "01", "02"]


def test_a_metric_that_is_added_is_measured_without_restoring_again(pairs: Path, tmp_path: Path) -> None:
    counting = Counting()
    sets = find_sets(pairs, PROTOCOLS["classic-sr"])
    first = an_evaluation(tmp_path / "out")
    list(first.run(first.tasks(sets, [counting.method])))
    more = load_metrics(["psnr", "ssim", "gmsd"], MetricSettings())
    second = Evaluation(tmp_path / "out", PROTOCOLS["classic-sr"], more, tell=print)
    records = list(second.run(second.tasks(sets, [counting.method])))
    assert len(counting.restored) == 3
    assert all(record.metrics.keys() == {"psnr", "ssim", "gmsd"} for record in records)


def test_a_method_that_fails_on_one_picture_is_reported_for_that_picture(pairs: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def restore(given: Given, _: Settings) -> Pixels:
        if given.pair.name == "01":
            raise ImageError("too blue for this network")
        if given.pair.name == "02":
            return given.lq
        return resize_bicubic_matlab(given.lq, given.height, given.width)

    method = Method(name="picky", what="picky", identity="", load=lambda: restore)
    evaluation = an_evaluation(tmp_path / "out", told)
    tasks = evaluation.tasks(find_sets(pairs, PROTOCOLS["classic-sr"]), [*baselines(4), method])
    records = list(evaluation.run(tasks))
    assert told == [
        "Tiny/01, picky: too blue for this network",
        "Tiny/02, picky: the result has 16x12 px (height x width), expected 64x48",
    ]
    assert [bool(record.error) for record in records] == 6 * [False] + [False, True, True]


def test_a_method_that_cannot_be_loaded_is_tried_once_and_the_others_go_on(pairs: Path, tmp_path: Path) -> None:
    told: list[str] = []
    tried: list[int] = []

    def load() -> Any:
        tried.append(1)
        raise CheckpointError("cut short")

    evaluation = an_evaluation(tmp_path / "out", told)
    broken = Method(name="broken", what="", identity="", load=load)
    tasks = evaluation.tasks(find_sets(pairs, PROTOCOLS["classic-sr"]), [broken, *baselines(4)])
    assert [bool(record.error) for record in evaluation.run(tasks)] == 3 * [True] + 6 * [False]
    assert len(tried) == 1 and told[0] == "Tiny/00, broken: cannot be loaded: cut short"


def test_pictures_that_cannot_be_compared_are_named_and_the_rest_goes_on(pairs: Path, tmp_path: Path) -> None:
    (pairs / "Tiny_LRx4" / "00x4.png").write_bytes(b"no picture")
    save(np.zeros((64, 60, 3), np.uint8), pairs / "Tiny_HR" / "01.png")
    save(np.zeros((64, 48, 3), np.uint8), pairs / "Tiny_HR" / "alone.png")
    save(np.zeros((16, 12, 3), np.uint8), pairs / "Tiny_LRx4" / "lonely.png")
    ran = stablesr("evaluate", pairs, "--protocol", "classic-sr", "--method", "known=nonblind", "-o", tmp_path / "out")
    assert ran.exit_code == 1
    errors = "\n".join(line for line in error_lines(ran) if line.startswith("error: "))
    assert re.search(r"alone\.png: has no LQ partner", errors) and re.search(r"lonely\.png: has no truth", errors)
    assert re.search(r"Tiny/00: .*00x4\.png: not a picture", errors)
    assert re.search(r"Tiny/01: .*64x60 px \(height x width\) is not 4 times its input 01x4.png of 16x12", errors)
    assert len(errors.splitlines()) == 4, "each is told once, not once per method"
    report = report_of(tmp_path / "out")
    assert len(report["problems"]) == 4
    bicubic = row_of(report, "bicubic")["psnr"]
    assert (bicubic["n"], bicubic["low"], bicubic["high"]) == (1, None, None)


def test_a_metric_without_a_value_does_not_count(pairs: Path, tmp_path: Path) -> None:
    save(data.astronaut()[:64, 180:228], pairs / "Tiny_HR" / "00.png")
    for name, truth in truths(3):
        other = truth if name == "00" else np.zeros_like(truth)
        save(other, tmp_path / "theirs" / "Tiny" / f"{name}.png")
    save(data.astronaut()[40:104, 180:228], pairs / "Tiny_HR" / "00.png")
    stablesr(
        "evaluate", pairs, "--protocol", "classic-sr", "--method", f"x={tmp_path / 'theirs'}", "-o", tmp_path / "o"
    )
    report = report_of(tmp_path / "o")
    assert row_of(report, "x")["psnr"]["n"] == 2
    assert row_of(report, "x")["ciede2000"]["n"] == 3
    assert "PSNR has no finite value for 1 of x on Tiny: 00" in report["notes"]


def test_two_processes_give_the_same_table(pairs: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", pairs, "--protocol", "classic-sr", "--method", f"tiny={model}", "--study", "w", "-o"]
    assert stablesr(*arguments, tmp_path / "one").exit_code == 0
    shared = stablesr_in_two_processes(*arguments, tmp_path / "two", folder=tmp_path)
    assert shared.returncode == 0, shared.stderr
    one, two = (report_of(tmp_path / name) for name in ("one", "two"))
    reasons = [report.pop("absent") for report in (one, two)]  # the other processes have not the network of tests
    assert one == two
    assert reasons[0].keys() == reasons[1].keys()


def test_the_w_study_has_a_row_per_value_and_strips_of_pictures(pairs: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--method", f"tiny={model}", "--limit", 1, "--study", "w", "--study", "steps", "-o", out]
    assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
    report = report_of(out)
    assert [row["at"] for row in report["studies"]["w"]["rows"]] == [{"w": w} for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert len({row["metrics"]["psnr"]["mean"] for row in report["studies"]["w"]["rows"]}) > 1
    assert [row["at"]["steps"] for row in report["studies"]["steps"]["rows"]] == [1, 2, 4, 8, 16]
    page = (out / "index.html").read_text(encoding="utf-8")
    shown = json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    (group,) = (one for one in shown["groups"] if one["title"] == "Fidelity w, Tiny")
    titles = [view["title"] for view in group["pictures"][0]["views"]]
    assert titles == [*(f"tiny w={w}" for w in (0.0, 0.25, 0.5, 0.75, 1.0)), "truth"]


def test_a_crop_is_told_where_the_protocol_has_whole_pictures(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--method", "known=nonblind", "--crop", 32, "-o", out]
    assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
    with Image.open(out / "pictures" / "Tiny" / "bicubic" / "00.png") as image:
        assert image.size == (32, 32)
    for name in ("report.md", "index.html"):
        assert "the middle 32 px of each picture, by --crop" in (out / name).read_text(encoding="utf-8")


def test_the_seeds_study_maps_what_is_invented(pairs: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--method", f"tiny={model}", "--limit", 1, "--study", "seeds", "-o", out]
    assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
    (maps,) = report_of(out)["studies"]["seeds"]["maps"]
    assert maps["deviation"] > 0 and maps["difference"] > 0
    with Image.open(out / maps["deviation_map"]) as image:
        assert image.size == (48, 64) and np.asarray(image).max() > 0


def test_kernel_mismatch_is_least_where_the_kernel_is_known(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--method", "known=nonblind", "--study", "kernel-mismatch", "-o", out]
    assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
    rows = report_of(out)["studies"]["kernel-mismatch"]["rows"]
    psnr = {
        (row["at"]["sigma_lr"], row["at"]["sigma_sr"]): row["metrics"]["psnr"]["mean"]
        for row in rows
        if "sigma_sr" in row["at"]
    }
    sigmas = sorted({true for true, _ in psnr})
    assert len(psnr) == len(sigmas) ** 2
    for true in sigmas:
        assert max(sigmas, key=lambda assumed: psnr[true, assumed]) == true
    assert psnr[0.6, 3.0] < psnr[0.6, 0.6] - 3, "a kernel assumed too large makes rings"


def test_degradations_are_drawn_by_the_name_of_the_picture_alone(pairs: Path, tmp_path: Path) -> None:
    reports = []
    for limit in (1, 2):
        out = tmp_path / str(limit)
        arguments = ["--method", "known=nonblind", "--study", "degradation", "--limit", limit, "-o", out]
        assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
        reports.append(report_of(out))
    rows = [row for row in reports[0]["studies"]["degradation"]["rows"] if row["method"] == "bicubic"]
    values = {row["at"]["degradation"]: row["metrics"]["psnr"]["mean"] for row in rows}
    assert values["stablesr-512"] < values["light"] < values["bicubic"]
    results = [tmp_path / str(n) / "pictures" / "Tiny" / "bicubic@stablesr-512" / "00.png" for n in (1, 2)]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_faces_are_measured_as_faces(tmp_path: Path) -> None:
    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline

    face = np.asarray(Image.fromarray(data.astronaut()[0:256, 96:352]).resize((64, 64), Image.Resampling.LANCZOS))
    save(face, tmp_path / "data" / "CelebA-Test" / "hq" / "a.png")
    save(
        np.asarray(Image.fromarray(face).resize((16, 16)).resize((64, 64))), tmp_path / "data" / "CelebA-Test/lq/a.png"
    )
    CodeFormerPipeline(tiny_codeformer()).save_pretrained(tmp_path / "tiny")
    methods = ["--method", f"own={tmp_path / 'tiny'}", "--method", f"nearest={tmp_path / 'tiny'},code_lookup=nearest"]
    arguments = [*methods, "--study", "w", "-o", tmp_path / "out"]
    ran = stablesr("evaluate", tmp_path / "data", "--protocol", "codeformer-2022", *arguments)
    assert ran.exit_code == 0, ran.stderr
    report = report_of(tmp_path / "out")
    assert [row["method"] for row in report["rows"]] == ["input", "own", "nearest"]
    own, nearest = (row_of(report, name, "CelebA-Test") for name in ("own", "nearest"))
    assert own.keys() >= {"psnr", "ssim", "identity"}
    assert own["psnr"]["mean"] != nearest["psnr"]["mean"]
    assert len(report["studies"]["w"]["rows"]) == 10


def test_the_losses_study_compares_what_is_called_as_the_losses_are(pairs: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = [f"adversarial={model},steps=1", f"mse={model},steps=2", "known=nonblind"]
    arguments = [word for method in methods for word in ("--method", method)]
    stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments, "--limit", 1, "--study", "losses", "-o", out)
    rows = report_of(out)["studies"]["losses"]["rows"]
    assert [(row["method"], row["at"]) for row in rows] == [(name, {"loss": name}) for name in ("mse", "adversarial")]
    assert rows[0]["metrics"] == row_of(report_of(out), "mse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "stablesr"], "did you mean 'stablesr-2023'"),
        (["--protocol", "classic-sr", "--study", "ww"], "known: w, steps"),
        (["--protocol", "classic-sr", "--metric", "psnrr"], "give one of psnr"),
        (["--protocol", "classic-sr", "--method", "nonsense"], "give NAME=WHAT"),
        (["--protocol", "classic-sr", "--method", "truth=mini"], "give NAME=WHAT"),
        (["--protocol", "classic-sr", "--method", "x=nonblind,w=1"], "w is no setting of nonblind; it takes sigma"),
        (["--protocol", "classic-sr", "--method", "x=nonblind,sigma"], "give key=value"),
        (["--protocol", "classic-sr", "--method", "bicubic=nonblind"], "two methods are called bicubic"),
        (["--protocol", "classic-sr", "--method", "x=there/is/none.pth"], "no such file"),
        (["--protocol", "classic-sr", "--method", "x=nonblind", "--study", "w"], "no method here has a fidelity w"),
        (["--protocol", "classic-sr", "--crop", "10"], "must be a multiple of the scale 4"),
        (["--protocol", "classic-sr", "--weights", "nowhere"], "is no folder"),
        (["--protocol", "codeformer-2022"], "expected folders SET/hq and SET/lq"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(
    arguments: list[str], message: str, pairs: Path, tmp_path: Path
) -> None:
    ran = stablesr("evaluate", pairs, *arguments, "-o", tmp_path / "out")
    assert ran.exit_code == 2
    assert message in " ".join(error_lines(ran)[-1:])
    assert not (tmp_path / "out" / "report.json").exists()


def test_one_picture_has_no_interval_and_intervals_hold_the_mean() -> None:
    assert mean_of([3.0]) == (3.0, 1, None, None)
    values = np.random.default_rng(0).normal(5, 2, 200)
    mean = mean_of(values.tolist())
    assert mean.low is not None and mean.high is not None
    standard_error = values.std() / np.sqrt(200)
    assert mean.low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.05)
    assert mean.high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.05)


def test_one_picture_has_no_metric_of_whole_sets_and_a_note_says_so(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for limit, expected in ((1, 0), (2, 1)):
        arguments = ["--method", "known=nonblind", "--metric", "warping-error", "--limit", limit, "-o", out]
        assert stablesr("evaluate", pairs, "--protocol", "classic-sr", *arguments).exit_code == 0
        report = report_of(out)
        assert ("warping-error" in row_of(report, "bicubic")) == bool(expected)
        note = "E_warp x 1000 of Tiny needs at least two pictures with a truth, and 1 is here"
        assert (note in report["notes"]) == (not expected)


def test_layouts_of_the_published_test_sets_are_found(tmp_path: Path) -> None:
    folders = ("DIV2K_V2_val/gt", "DIV2K_V2_val/lq", "RealSRVal_crop128/test_HR", "RealSRVal_crop128/test_LR")
    for folder in (*folders, "DPED-iphone/lq", "Other_HR", "Other_LRx4"):
        save(np.zeros((8, 8, 3), np.uint8), tmp_path / folder / "1.png")
    sets = find_sets(tmp_path, PROTOCOLS["stablesr-2023"])
    assert [(one.name, one.pairs[0].hq is not None) for one in sets] == [
        ("DIV2K_V2_val", True),
        ("DPED-iphone", False),
        ("Other", True),
        ("RealSRVal_crop128", True),
    ]
    assert sets[0].notes == ["DIV2K_V2_val: 1 of the 3000 pictures of stablesr-2023 are here"]


def test_every_task_is_told_apart_by_its_label(pairs: Path, tmp_path: Path) -> None:
    evaluation = an_evaluation(tmp_path / "out")
    sets = find_sets(pairs, PROTOCOLS["classic-sr"])
    method = Method(name="m", what="", identity="", load=lambda: Counting(), takes=frozenset({"w"}))
    plain, changed = (evaluation.tasks(sets, [method], settings, AS_GIVEN)[0].label for settings in ({}, {"w": 0.5}))
    assert (plain, changed) == ("m", "m@w=0.5")
