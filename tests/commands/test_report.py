"""`llmctl report`: what a page and a summary say of runs, and what is refused."""

import html
import json
import math
import re
import shutil
import subprocess
import sys

import pytest

from llmctl import metrics, numbers
from llmctl.reporting.curves import panels, smoothed, thinned
from llmctl.reporting.draw import draw, log_ticks, ticks
from llmctl.reporting.graph import edges, graphs
from llmctl.reporting.records import read_records
from llmctl.reporting.texts import samples_of
from tests.made_runs import curve, make_life, make_run
from tests.run_files import write_rows

DASH = numbers.MISSING
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


@pytest.fixture
def life(tmp_path):
    return make_life(tmp_path / "life")


def page_of(cli, tmp_path, *arguments):
    out = tmp_path / "page.html"
    result = cli("report", *arguments, "-o", out)
    assert result.code == 0, result.err
    assert result.out == f"{out}\n"
    return out.read_text()


def text_of(page):
    """What a reader sees."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split()).replace(DASH, "-")


def test_a_real_run_is_told_in_full(cli, base, tokens, tmp_path):
    page = page_of(cli, tmp_path, base)
    text = text_of(page)
    manifest = json.loads((base / "manifest.json").read_text())
    assert f"One run of llmctl pretrain, completed in {text_seconds(manifest)}" in text
    assert f"Validation loss {manifest['result']['val_loss']:.4g}" in text
    assert "Loss nats" in text
    assert "tokenize tok" in text, "the run that fed it"
    assert f"llmctl pretrain --tokens {tokens}" in text
    assert "Settings that are not the default" in text
    assert "max_steps - 60" in text
    assert "energy found by" in text
    for package in ("torch", "transformers"):
        assert f"{package} {manifest['versions'][package]}" in text


def text_seconds(manifest):
    return numbers.seconds(manifest["energy"]["seconds"]).replace(numbers.NARROW, " ")


def test_a_page_needs_nothing_else(cli, life, tmp_path):
    page = page_of(cli, tmp_path, life)
    places = re.findall(r"(?:src|href|url|action)\s*[=(]\s*[\"']?([^\"'>) ]+)", page)
    assert {place[0] for place in places} <= {"#", "d"}, "anchors, and an empty icon"
    assert "default-src 'none'" in page
    assert page.count("<script") == 2


def test_a_folder_of_runs_stands_in_order_with_its_graph(cli, life, tmp_path):
    text = text_of(page_of(cli, tmp_path, life))
    assert text.startswith("life life 5 runs, all completed in 2 min 35 s.")
    heads = [text.index(f"{name} {word}") for name, word in (
        ("tokenize", "Train a tok"), ("pretrain", "Train a causal"), ("sft", "Fine-tune"),
        ("reward", "Train a reward"), ("ppo", "Align"), ("texts", "What llmctl"),
        ("repeat", "How to"))]  # fmt: skip
    assert heads == sorted(heads)
    assert "Wins against the reference 80 % 60 % to 92 % (95 %)" in text
    assert "rows cut: 4 raise --max-length" in text
    assert "Say hi. before score -1.50 no now, step 30 score 2.25 Hi, please." in text
    assert "Question 1? step 10 mumble step 60 An answer." in text
    assert "Once response upon a time …" in text
    assert "Calibration % right by % sure; error 0.05" in text
    assert "Wins against the reference \N{GREATER-THAN OR EQUAL TO} 75 % 80 % ✓ holds" in text
    assert "✗ does not hold" in text
    records, _ = read_records([life])
    assert [record.stage for record in records] == ["tokenize", "pretrain", "sft", "reward", "ppo"]
    nodes, pairs = edges(records)
    named = {(nodes[a][0], nodes[b][0]) for a, b in pairs}
    assert named == {
        ("tokenize", "pretrain"),
        ("pretrain", "sft"),
        ("sft", "reward"),
        ("sft", "ppo"),
        ("reward", "ppo"),
    }
    lying, upright = graphs(records)
    places = {box.stage: (box.x, box.y) for box in lying.boxes}
    rows = {name: y for name, (_, y) in places.items()}
    assert rows["tokenize"] == rows["pretrain"] == rows["sft"] == rows["ppo"] < rows["reward"]
    assert len(set(places.values())) == 5, "no box on another"
    assert {(box.stage, (box.y, box.x)) for box in upright.boxes} != set(places.items())


def test_runs_that_were_moved_still_find_each_other(cli, life, tmp_path):
    moved = tmp_path / "elsewhere" / "life"
    shutil.move(life, moved)
    assert len(edges(read_records([moved])[0])[1]) == 5


def test_runs_side_by_side_say_what_differs(cli, tmp_path):
    for name, lr, loss in (("a", 0.001, 2.5), ("b", 0.003, 2.25)):
        make_run(
            tmp_path / name,
            "sft",
            metrics=curve(30, start=loss),
            recipe={"lr": lr, "max_steps": 30, "epochs": None},
            samples=[{"step": 30, "prompt": "Q?", "response": f"from {name}"}],
            result={"val_loss": loss, "best_step": 30},
        )
    text = text_of(page_of(cli, tmp_path, tmp_path / "a", tmp_path / "b"))
    assert text.startswith("a, b a, b 2 runs, all completed")
    assert "Validation loss 2.5 2.25" in text
    assert "lr ≠ - 0.001 0.003" in text
    assert "max_steps - 30 30" in text
    assert "epochs" not in text, "the default is not told"
    assert "Q? a, step 30 from a b, step 30 from b" in text
    for label in ("a, training", "a, held out", "b, training", "b, held out"):
        assert label in text


def test_several_life_cycles_are_told_apart(cli, tmp_path):
    lives = [make_life(tmp_path / name) for name in ("x", "y")]
    page = page_of(cli, tmp_path, *lives)
    text = text_of(page)
    assert text.startswith("x, y x, y 10 runs, all completed in 5 min 10 s. Of 4 gates, 2 did not")
    assert "x/ppo Wins against the reference \N{GREATER-THAN OR EQUAL TO} 75" in text
    assert "y/ppo" in text
    assert "x/texts.jsonl" in text
    assert "y/texts.jsonl" in text
    assert page.count('<tr class="broken">') == 2


def test_a_command_that_made_several_runs_is_told_once(cli, tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name, "sft", command=["llmctl", "run", "life.yaml"])
    text = text_of(page_of(cli, tmp_path, tmp_path / "a", tmp_path / "b"))
    assert f"# {tmp_path / 'a'} # {tmp_path / 'b'} llmctl run life.yaml" in text
    md = cli("report", tmp_path / "a", tmp_path / "b", "--format", "md").out
    assert md.count("llmctl run life.yaml") == 1


def test_runs_of_one_name_are_told_apart(cli, tmp_path):
    for parent in ("x", "y"):
        make_run(tmp_path / parent / "sft", "sft", metrics=curve(5))
    text = text_of(page_of(cli, tmp_path, tmp_path / "x/sft", tmp_path / "y/sft"))
    assert "x/sft" in text
    assert "y/sft" in text


@pytest.mark.parametrize(
    ("state", "status", "wanted"),
    [
        ("failed", {"exit_code": 1, "error": "boom <b>"}, ["failed", "exit code 1", "boom <b>"]),
        ("diverged", {"exit_code": 7, "error": "NaN"}, ["diverged", "exit code 7"]),
        ("running", {"exit_code": None}, ["killed"]),
    ],
)
def test_a_run_that_did_not_end_well_says_so(cli, tmp_path, state, status, wanted):
    run = make_run(tmp_path / "run", "pretrain", state=state, status=status, metrics=curve(20))
    (run / "checkpoints/checkpoint-10").mkdir(parents=True)
    text = text_of(page_of(cli, tmp_path, run))
    for words in wanted:
        assert words in text
    assert f"llmctl pretrain -c {run}/recipe.yaml -o {run} --resume" in text
    assert "Loss nats" in text, "its curves so far"


def test_a_run_at_work_is_running(cli, tmp_path):
    from llmctl.runs.lock import locked

    run = make_run(tmp_path / "run", "pretrain", state="running", metrics=curve(20))
    with locked(run):
        text = text_of(page_of(cli, tmp_path, run))
    assert "One run of llmctl pretrain, running" in text


def test_hostile_texts_stay_texts(cli, tmp_path):
    run = make_run(
        tmp_path / "run",
        "sft",
        metrics=[*curve(5), {"step": 5, f"score/{HOSTILE}": 1.0}],
        samples=[{"step": 5, "prompt": HOSTILE, "response": "\x1b[31m\x00" + HOSTILE}],
        recipe={"system": HOSTILE},
        result={"val_loss": 1.0, HOSTILE: 2.0, "nested": {HOSTILE: HOSTILE}},
        command=["llmctl", "sft", HOSTILE],
        inputs=[{"role": HOSTILE, "path": HOSTILE, "sha256": HOSTILE}],
        audit={"rows": 1, "findings": [{"level": HOSTILE, "message": HOSTILE}]},
    )
    page = page_of(cli, tmp_path, run, "--title", HOSTILE)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "49" not in re.findall(r"onerror=alert\(1\)[^&]*&gt;(\d+)", page)
    assert "\x1b" not in page
    assert "\x00" not in page
    assert text_of(page).count("{{ 7 * 7 }}") >= 8
    md = cli("report", run, "--format", "md", "--title", HOSTILE).out
    outside = re.sub(r"```.*?```", "", md, flags=re.DOTALL)  # code is shown as it is
    assert not re.search(r"(?<!\\)<(script|img|/script)", outside)


def test_damaged_lines_are_left_out_and_counted(cli, tmp_path):
    rows = [{"step": 1, "loss": 3.0}, "{torn", "[1]", {"step": 2, "loss": None}, "",
            {"step": "x", "loss": 2.0}, {"step": 3, "loss": 1.5}]  # fmt: skip
    run = make_run(tmp_path / "run", "pretrain", metrics=rows)
    (run / "recipe.yaml").write_text("a: [")
    page = page_of(cli, tmp_path, run)
    text = text_of(page)
    assert "metrics.jsonl: 2 damaged lines are left out" in text
    assert "recipe.yaml: malformed YAML" in text
    (first, _) = panels(read_records([run])[0])
    assert first[0].series[0].points == ((1, 3.0), (3, 1.5))


def test_a_damaged_run_among_others_is_left_out_with_a_note(cli, life, tmp_path):
    (life / "sft/manifest.json").write_text("{torn")
    text = text_of(page_of(cli, tmp_path, life))
    assert "sft is left out: its records are damaged" in text
    assert "4 runs" in text


def test_secrets_are_not_told(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "s3cretvalue")
    run = make_run(
        tmp_path / "run",
        "sft",
        metrics=curve(5),
        samples=[{"step": 5, "prompt": "the s3cretvalue", "response": "hf_" + "a" * 30}],
        command=["llmctl", "sft", "--data", "https://me:s3cretvalue@host/x"],
    )
    for arguments in ((), ("--format", "md")):
        out = tmp_path / "out"
        result = cli("report", run, "-o", out, "--title", "s3cretvalue", *arguments)
        assert result.code == 0, result.err
        page = out.read_text()
        out.unlink()
        assert "s3cretvalue" not in page
        assert "hf_aaaa" not in page
        assert "[redacted]" in page.replace("\\", "")


def test_results_of_any_shape_become_tables(cli, tmp_path):
    quantize = make_run(
        tmp_path / "quantize",
        "quantize",
        result={"perplexity_before": 10.0, "perplexity_after": 10.5, "perplexity_increase": 0.05,
                "disk_bytes_before": 4_000_000, "disk_bytes_after": 1_000_000, "kl": 0.01,
                "kept_layers": {"lm_head": "the output layer"}, "slower": ["fp32"],
                "samples": [{"prompt": "P", "before": "one", "after": "two"}]},
    )  # fmt: skip
    evaluate = make_run(
        tmp_path / "evaluate",
        "evaluate",
        minute=1,
        result={"model": "A", "exact": 0.5, "compare": {"model": "B", "exact": 0.25},
                "differences": {"exact": {"difference": 0.25, "low": 0.1, "high": 0.4}}},
    )  # fmt: skip
    rows = [{"side": "a", "prompt": "2+2?", "response": "4", "reference": "4", "exact": 1.0}]
    write_rows(evaluate / "rows.jsonl", rows)
    (evaluate / "report.json").write_text('{"by_task": {"x": {"n": 3}, "y": {"n": 5}}, "n": 8}')
    text = text_of(page_of(cli, tmp_path, quantize, evaluate)).replace(
        "\N{MULTIPLICATION SIGN}", "x"
    )
    assert "before after change Perplexity 10 10.5 1.05 x" in text
    assert "Weights on disk 4 MB 1 MB 0.25 x" in text
    assert "+5 %" in text
    assert "Lm head the output layer" in text
    assert "P before one after two" in text
    assert "A B difference 95 % Exact matches 50 % 25 % +0.25 +0.1 to +0.4" in text
    assert "2+2? reference 4 a exact matches 100 % 4" in text
    assert "By task X Y N 3 5" in text


def test_markdown_is_a_summary_for_ci(cli, life):
    result = cli("report", life, "--format", "md")
    assert result.code == 0, result.err
    md = result.out
    assert md.startswith(
        "# life\n\n5 runs, all completed in 2 min 35 s. Of 2 gates, 1 did not hold.\n"
    )
    assert "| sft | sft | ✅ completed | Validation loss 2.1, Token accuracy, held out 51.2 %" in (
        md.replace(numbers.NARROW, " "))  # fmt: skip
    assert "```mermaid\nflowchart LR\n" in md
    assert '"reward: reward"' in md
    assert md.count("<details>") == md.count("</details>") > 5
    assert "| Say hi. | now, step 30 score 2.25 | Hi, please. |" in md
    for line in md.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) >= 3


def test_json_carries_every_result(cli, life, tmp_path):
    out = tmp_path / "x.html"
    found = json.loads(cli("report", life, "-o", out, "--json").out)
    assert found["out"] == str(out)
    assert [run["status"] for run in found["runs"]] == ["completed"] * 5
    assert found["runs"][1]["result"]["val_loss"] == 2.03
    assert found["runs"][1]["energy"]["kwh"] == 0.0012
    md = json.loads(cli("report", life, "--format", "md", "--json").out)
    assert md["out"] is None
    assert md["text"].startswith("# life")


def test_what_ends_in_md_is_markdown(cli, life, tmp_path):
    result = cli("report", life, "-o", tmp_path / "x.md")
    assert result.out == f"{tmp_path / 'x.md'}\n"
    assert (tmp_path / "x.md").read_text().startswith("# life")


def test_a_report_replaces_a_report_and_nothing_else(cli, life, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("report", life).out == "report.html\n"
    (life / "sft/samples.jsonl").unlink()
    assert cli("report", life).code == 0
    assert "mumble" not in (tmp_path / "report.html").read_text()
    mine = tmp_path / "mine.html"
    mine.write_text("my own page")
    refused = cli("report", life, "-o", mine)
    assert refused.code == 3
    assert "the output file exists" in refused.err
    assert mine.read_text() == "my own page"
    assert cli("report", life, "-o", mine, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "RUN is required"),
        (["{}/none"], 3, "no such directory"),
        (["{}/file"], 3, "not a directory"),
        (["{}/empty"], 3, "no runs in this directory"),
        (["{}/torn"], 3, "this run cannot be read"),
        (["{}/torn", "{}/good"], 3, "this run cannot be read"),
        (["{}/good", "--format", "pdf"], 2, "--format"),
        (["{}/good", "-o", "{}/none/x.html"], 3, "no such directory"),
        (["{}/good", "-o", "{}/empty"], 3, "a directory is in the way"),
    ],
)
def test_refusals(cli, tmp_path, arguments, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    make_run(tmp_path / "good", "sft", metrics=curve(3))
    make_run(tmp_path / "torn", "sft", metrics=curve(3))
    (tmp_path / "torn/status.json").write_text("{")
    result = cli("report", *(argument.format(tmp_path) for argument in arguments))
    assert result.code == code
    assert message in result.err
    assert result.out == ""


def test_no_torch_is_loaded(life, tmp_path):
    code = (
        "import sys; sys.argv = ['llmctl', 'report', sys.argv[1], '-o', sys.argv[2]]\n"
        "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from llmctl.cli import main; main()"
    )
    command = [sys.executable, "-c", code, str(life), str(tmp_path / "x.html")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(ran.stderr.split())
    assert "llmctl.reporting.html" in loaded
    assert not loaded & {"torch", "transformers", "accelerate", "datasets", "huggingface_hub"}


def test_a_long_run_makes_a_short_page(cli, tmp_path):
    run = make_run(tmp_path / "run", "pretrain", metrics=curve(20_000, val_every=1000))
    assert len(page_of(cli, tmp_path, run)) < 400_000


def test_an_alarm_of_ppo_is_a_note(cli, life, tmp_path):
    assert "alarm at step 3: KL explodes" in text_of(page_of(cli, tmp_path, life / "ppo"))


def test_smoothing_is_its_definition():
    points = [(float(x), math.sin(x) + x) for x in range(200)]
    keep = 1 - 1 / 10
    for place in (0, 1, 7, 150):
        weights = [(1 - keep) * keep ** (place - i) for i in range(place + 1)]
        mean = sum(w * y for w, (_, y) in zip(weights, points, strict=False)) / sum(weights)
        assert smoothed(points)[place] == pytest.approx((points[place][0], mean))
    assert smoothed([(0.0, 3.0)] * 30)[0][1] == pytest.approx(3.0), "no bias to its start"


def test_thinning_keeps_the_ends_and_the_extremes():
    points = [(float(x), math.sin(x * 1.7)) for x in range(5000)]
    points[3210] = (3210.0, 99.0)
    points[17] = (17.0, -99.0)
    few = thinned(points)
    assert len(few) <= 362
    assert {points[0], points[17], points[3210], points[-1]} <= set(few)
    assert few == sorted(few)
    assert thinned(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 60, [0, 10, 20, 30, 40, 50, 60]), (5, 5.01, None)],
)
def test_ticks_are_round_and_inside(low, high, found):
    marks = ticks(low, high, 5)
    assert marks == found or found is None
    assert 3 <= len(marks) <= 8
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_a_flat_curve_of_one_point_is_drawn(tmp_path):
    rows = [{"step": 5, "val_loss": 2.0}]
    make_run(tmp_path / "done", "sft", metrics=rows)
    assert panels(read_records([tmp_path / "done"])[0]) == ([], [])
    run = make_run(tmp_path / "run", "sft", metrics=rows, state="failed")
    ((panel,), _) = panels(read_records([run])[0])
    drawing = draw(panel)
    assert len(drawing.lines[0].dots) == 1
    assert drawing.y_ticks
    assert log_ticks(1e-6, 2e-3) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])


def test_the_kept_step_is_shown_not_the_last(tmp_path):
    samples = [
        {"step": step, "prompt": "Q", "response": f"at {step}", "finish_reason": "eos"}
        for step in (10, 20, 30)
    ]
    run = make_run(
        tmp_path / "run", "sft", metrics=curve(30), samples=samples, result={"best_step": 20}
    )
    (record,), _ = read_records([run])
    (found,) = samples_of(record)
    assert [text.text for text in found.rows[0].texts] == ["at 10", "at 20"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("val_loss", 2.03456, "2.035"),
        ("tokens", 1_234_567, "1.23M"),
        ("step", 5000, "5,000"),
        ("memory_bytes", 615_059_456, "615 MB"),
        ("eos_share", 0.9375, "93.8 %"),
        ("time", 3.42, "3.4 s"),
        ("time", 125, "2 min 05 s"),
        ("time", 9.99, "10 s"),
        ("seconds", 12_000, "3 h 20 min"),
        ("kwh", 4.2e-5, "42 mWh"),
        ("kwh", 12.5, "12.5 kWh"),
        ("lr", 3e-5, "3e-05"),
        ("lr", 0, "0"),
        ("score/exact", 0.5, "0.5"),
        ("perplexity_increase", -0.012, "-1.2 %"),
        ("loss", float("nan"), DASH),
        ("parameters", 999_999, "1M"),
    ],
)
def test_numbers_are_said_as_people_do(key, value, shown):
    assert metrics.value(key, value).replace(numbers.NARROW, " ") == shown
