"""`ssrctl critic --critic llm` as a user runs it: through outages, kills and budgets, nothing lost, nothing made up."""

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("litellm")

from critics.llm.fault_server import FAULTS as KINDS
from critics.llm.fault_server import FaultServer, failure, score_of

from ssrctl.cli import main
from ssrctl.io.jsonl import read_jsonl
from ssrctl.text.segment import segment

FAULTS = {
    "error_500": 0.06, "rate_limit": 0.04, "closed_socket": 0.04, "cut_body": 0.02, "truncated_json": 0.02,
    "empty_reply": 0.02, "prose": 0.02, "half_reply": 0.02, "too_few": 0.02, "from_zero": 0.02, "out_of_range": 0.01,
    "nan": 0.01,
}  # fmt: skip
CLASSES = {
    "api_error", "rate_limit", "connection", "empty_reply", "bad_json", "missing_index", "bad_index", "out_of_range",
}  # fmt: skip
SHARE = sum(FAULTS.values())


def write_traces(path, count):
    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            text = f"First, {i}+1={i + 1}.\nThen {i + 1}*2={2 * i + 2}.\n#### {2 * i + 2}"
            steps = [{"start": s.start, "end": s.end, "kind": s.kind} for s in segment(text)]
            row = {
                "id": f"q{i}/0",
                "question": f"({i}+1)*2",
                "answer": str(2 * i + 2),
                "response": text,
                "steps": steps,
            }
            stream.write(json.dumps(row) + "\n")
    return path


def words(server, source, target, *more):
    return [
        "critic", str(source), "-o", str(target), "--critic", "llm", "--critic-model", "openai/judge",
        "--critic-api-base", server.base_url, "--critic-timeout", "60", "--critic-max-concurrency", "16",
        "--critic-cache-dir", str(target.parent / "cache"), *more,
    ]  # fmt: skip


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def check(rows):
    """Every step is truly scored or missing with its class. Returns how many are missing, by class."""
    missing = Counter()
    for row in rows:
        assert len(row["scores"]) == len(row["steps"]) == 3
        for step, score in zip(row["steps"], row["scores"], strict=True):
            text = row["response"][step["start"] : step["end"]]
            if score["score"] is None:
                assert score["reward"] is None and score["error"] in CLASSES
                missing[score["error"]] += 1
            else:
                assert score["score"] == score_of(text, step["kind"]) and score["error"] is None
    return missing


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr("ssrctl.critics.llm.client.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("ssrctl.critics.llm.client.MAX_RATE_LIMIT_WAIT_S", 0.01)


def test_failures_are_missing_and_the_next_run_mends_them(tmp_path, no_waits, capsys):
    source, target = write_traces(tmp_path / "steps.jsonl", 150), tmp_path / "scored.jsonl"
    with FaultServer(faults=FAULTS, seed=1) as server:
        call = words(server, source, target, "--critic-retries", "0", "--json")
        assert main(call) == 0
        summary = json.loads(capsys.readouterr().out)
        first = rows_of(target)
        missing = check(first)
        assert [row["id"] for row in first] == [f"q{i}/0" for i in range(150)]
        assert 0.1 * 150 < sum(missing.values()) / 3 < 0.4 * 150
        assert summary["missing"] == sum(missing.values()) and summary["missing_by_class"] == dict(missing)
        ledger = rows_of(tmp_path / "scored.jsonl.ledger.jsonl")
        assert len(ledger) == server.counts.total() and "First" not in json.dumps(ledger)

        whole = {row["id"] for row in first if all(score["error"] is None for score in row["scores"])}
        asked = server.counts.total()
        server.requests.clear()
        server.faults.clear()
        assert main(call) == 0
        assert server.counts.total() - asked == 150 - len(whole)
        assert not check(rows_of(target))
        again = json.loads(capsys.readouterr().out)
        assert again["kept_from_before"] == len(whole) and again["missing"] == 0
        assert main(call) == 0 and server.counts.total() - asked == 150 - len(whole)


def test_killed_in_the_middle_and_run_again_gives_the_file_of_one_run(tmp_path, no_waits):
    count = 80
    source = write_traces(tmp_path / "steps.jsonl", count)
    (tmp_path / "clean").mkdir()
    (tmp_path / "killed").mkdir()
    clean, target = tmp_path / "clean" / "scored.jsonl", tmp_path / "killed" / "scored.jsonl"
    with FaultServer(faults={"error_500": 0.2, "closed_socket": 0.1}, seed=2, keep=10_000) as server:
        chance = server.fault_of
        server.fault_of = lambda body, attempt: chance(body, attempt) if attempt < 2 else None
        start = [sys.executable, "-m", "ssrctl"]
        assert main(words(server, source, clean)) == 0
        server.forget()
        proper = server.fault_of
        held = server.counts.total() + 3 * count // 4  # further requests wait for the kill
        server.fault_of = lambda body, attempt: "stall" if server.counts.total() >= held else proper(body, attempt)
        process = subprocess.Popen(
            start + words(server, source, target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        partial = target.with_name("scored.jsonl.partial")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") > count // 4):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert not target.exists() and process.returncode == -signal.SIGKILL
        stored = {row["id"] for row in rows_of_torn(partial)}
        assert count // 4 < len(stored) < count
        server.forget()
        server.fault_of = proper
        server.requests.clear()
        assert main(words(server, source, target)) == 0
        asked = {numbers_of(request.body["messages"]) for request in server.requests}
    assert not asked & {int(re.search(r"\d+", name).group()) for name in stored}
    assert rows_of(target) == rows_of(clean) and not check(rows_of(target))
    assert sorted(file.name for file in target.parent.iterdir()) == sorted(file.name for file in clean.parent.iterdir())


def rows_of_torn(path):
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def numbers_of(messages):
    return int(re.search(r"\((\d+)\+1\)\*2", messages[-1]["content"]).group(1))


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path, no_waits, capsys):
    source, target = write_traces(tmp_path / "steps.jsonl", 30), tmp_path / "scored.jsonl"
    partial = tmp_path / "scored.jsonl.partial"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FaultServer() as server:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
            assert main(words(server, source, target, "--no-critic-cache", "--ledger", os.devnull)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        stored = len(rows_of_torn(partial))
        error = capsys.readouterr().err
        assert f"cannot write {partial}: File too large" in error and f"{stored} responses are scored and kept" in error
        assert 0 < stored < 30 and not target.exists()
        assert main(words(server, source, target, "--no-critic-cache")) == 0
        # Not the server's count, which requests cancelled by the first run may still raise.
        assert len(rows_of(tmp_path / "scored.jsonl.ledger.jsonl")) == 30 - stored
    assert len(rows_of(target)) == 30 and not check(rows_of(target)) and not partial.exists()


def test_scores_about_to_be_replaced_are_told(tmp_path, no_waits, capsys):
    source, target = write_traces(tmp_path / "steps.jsonl", 5), tmp_path / "scored.jsonl"
    with FaultServer() as server:
        assert main(words(server, source, target)) == 0
        assert "warning" not in capsys.readouterr().err
        assert main(words(server, source, target, "--limit", "2")) == 0
        assert f"3 scored responses that {target} held are not in this input" in capsys.readouterr().err
        assert main(words(server, source, target, "--critic-per-step")) == 0
        assert "holds 2 responses scored with other settings" in capsys.readouterr().err
        assert main(words(server, target, target, "--critic-per-step")) == 0
        assert "warning" not in capsys.readouterr().err
    assert len(rows_of(target)) == 5


def test_ctrl_c_keeps_what_is_done(tmp_path):
    source, target = write_traces(tmp_path / "steps.jsonl", 60), tmp_path / "scored.jsonl"
    with FaultServer(faults={"stall": 0.3}, seed=4, stall_seconds=300.0) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "ssrctl", *words(server, source, target)],
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and server.counts["stall"] < 16:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    text = err.decode()
    assert "Traceback" not in text and "Unclosed" not in text and "interrupted" in text
    kept = rows_of_torn(target.with_name("scored.jsonl.partial"))
    assert kept and not check(kept) and f"{len(kept)} responses are scored and kept" in text


def test_a_budget_ends_the_run_with_code_3_and_a_larger_one_goes_on(tmp_path, no_waits, capsys):
    source, target = write_traces(tmp_path / "steps.jsonl", 80), tmp_path / "scored.jsonl"
    prices = [
        "--critic-input-price",
        "1",
        "--critic-output-price",
        "2",
        "--critic-thinking-tokens",
        "0",
        "--critic-max-concurrency",
        "4",
    ]
    with FaultServer() as server:
        call = words(server, source, target, *prices)
        assert main([*call, "--critic-budget-usd", "0.05"]) == 3
        err = capsys.readouterr().err
        assert "budget" in err and "run the same command again" in err
        done = len(rows_of_torn(target.with_name("scored.jsonl.partial")))
        assert 0 < done < 80 and not target.exists()
        spent = sum(row["cost_usd"] for row in rows_of(tmp_path / "scored.jsonl.ledger.jsonl"))
        assert 0 < spent <= 0.05
        assert main([*call, "--critic-budget-usd", "5"]) == 0
        assert len(rows_of(target)) == 80 and not check(rows_of(target))
        assert server.counts.total() == 80


def test_dry_run_tells_calls_tokens_and_cost_and_sends_nothing(tmp_path, capsys):
    source, target = write_traces(tmp_path / "steps.jsonl", 120), tmp_path / "scored.jsonl"
    with FaultServer() as server:
        call = words(
            server, source, target, "--dry-run", "--json", "--critic-input-price", "1", "--critic-output-price", "2"
        )
        assert main(call) == 0
        plan = json.loads(capsys.readouterr().out)
        assert server.counts.total() == 0 and not target.exists() and not (tmp_path / "cache").exists()
        assert main([word for word in call if word != "--dry-run"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert plan["calls"] == summary["calls"] == 120
        # the server counts four characters as a token, the plan uses a real tokenizer
        assert 0.5 < plan["prompt_tokens"] / summary["prompt_tokens"] < 2
        assert plan["cost_usd"] <= plan["most_cost_usd"] and summary["cost_usd"] <= plan["most_cost_usd"]
        assert plan["minutes"] > 0
        assert main(call) == 0
        after = json.loads(capsys.readouterr().out)
        assert after["calls"] == 0 and after["scored_before"] == 120
        assert main([*call, "--output", str(tmp_path / "other.jsonl")]) == 0
        assert json.loads(capsys.readouterr().out)["kept_replies"] == 120


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path):
    source = write_traces(tmp_path / "steps.jsonl", 100)
    targets = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with FaultServer() as server:
        both = [
            subprocess.Popen([sys.executable, "-m", "ssrctl", *words(server, source, target)], stderr=subprocess.PIPE)
            for target in targets
        ]
        results = [process.communicate(timeout=120)[1].decode() for process in both]
        assert [process.returncode for process in both] == [0, 0], results
        before = server.counts.total()
        assert main(words(server, source, tmp_path / "c.jsonl")) == 0
        assert server.counts.total() == before
    assert rows_of(targets[0]) == rows_of(targets[1]) and not check(rows_of(targets[0]))


def test_stdout_gets_the_rows_in_order(tmp_path, no_waits, capsys):
    source = write_traces(tmp_path / "steps.jsonl", 40)
    with FaultServer() as server:
        call = words(server, source, tmp_path / "unused")
        call[call.index("-o") + 1] = "-"
        assert main(call) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}/0" for i in range(40)] and not check(rows)


@pytest.mark.slow
def test_five_thousand_traces_with_three_in_ten_calls_failing(tmp_path):
    count = 5000
    source, target = write_traces(tmp_path / "steps.jsonl", count), tmp_path / "scored.jsonl"
    with FaultServer(faults=FAULTS, seed=5) as server:
        call = words(server, source, target, "--critic-max-concurrency", "64", "--critic-retries", "2")
        process = subprocess.Popen(
            [sys.executable, "-m", "ssrctl", *call], stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err.decode()[-2000:]
        rows = rows_of(target)
        missing = check(rows)
        failed = 1 - server.counts[None] / server.counts.total()
    assert [row["id"] for row in rows] == [f"q{i}/0" for i in range(count)]
    assert failed == pytest.approx(SHARE, abs=0.02)
    assert sum(missing.values()) / 3 < 0.06 * count
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 1.0e9, f"{peak / 1e6:.0f} MB"


def test_training_learns_from_an_llm_critic_and_notes_its_calls(tmp_path, no_waits):
    run = tmp_path / "run"
    with FaultServer(faults={"error_500": 0.1, "prose": 0.1}, seed=6) as server:
        call = words(server, "unused", run / "unused")
        call = ["train", *call[call.index("--critic") :], "-o", str(run), "--max-steps", "2"]
        call += ["--questions-per-step", "2", "--num-generations", "4", "--max-new-tokens", "48", "--save-steps", "2"]
        assert main(call) == 0
        asked = server.counts.total()
    metrics = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2] and all(row["num_units"] > 0 for row in metrics)
    scored = missing = 0
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        for row in rows_of(path):
            for step, score in zip(row["steps"], row["scores"], strict=True):
                if score["score"] is None:
                    missing += 1
                    assert score["error"] in CLASSES
                else:
                    scored += 1
                    if step["kind"] == "final" and row["final"]["extracted"] is None:
                        assert score["score"] == 0.0  # no answer, no credit, whatever the judge says
                        continue
                    assert score["score"] == score_of(row["response"][step["start"] : step["end"]], step["kind"])
    assert scored > 10 * missing
    calls = rows_of(run / "critic_calls.jsonl")
    assert sum(not row["cached"] for row in calls) == asked


def test_calibration_through_the_command(tmp_path, no_waits, capsys):
    labelled = tmp_path / "labelled.jsonl"
    texts = ["3+1=4", "4*2=8", "8-1=7"]
    first_wrong = next(i for i, text in enumerate(texts) if score_of(text, "step") < 0)
    rows = [
        {"id": f"p{i}", "problem": f"problem {i}", "steps": texts, "label": first_wrong if i % 2 else -1}
        for i in range(12)
    ]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with FaultServer() as server:
        call = words(server, "unused", tmp_path / "unused")
        call = ["critic", *call[call.index("--critic") :], "--calibrate", str(labelled), "--repeats", "2", "--json"]
        assert main([*call, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out)["calls"] == 24 and server.counts.total() == 0
        assert main(call) == 0
        result = json.loads(capsys.readouterr().out)
        assert server.counts.total() == 24  # the cache does not answer the second judgement from the first
    found = result["first_error"]
    assert found["erroneous_accuracy"] == 1.0 and found["correct_accuracy"] == 0.0
    assert result["noise"]["score_std"] == 0.0


def labelled_file(path, count=6):
    rows = [{"problem": f"problem {i}", "steps": ["3+1=4", "4*2=8"], "label": 1 if i % 2 else -1} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_calibration_keeps_its_judgements_and_makes_none_again(tmp_path, no_waits, capsys):
    labelled, target = labelled_file(tmp_path / "labelled.jsonl"), tmp_path / "judged.jsonl"
    with FaultServer() as server:
        call = words(server, "unused", target, "--no-critic-cache", "--critic-input-price", "1",
                     "--critic-output-price", "2", "--critic-max-concurrency", "1")  # fmt: skip
        call = ["critic", *call[call.index("-o") :], "--calibrate", str(labelled), "--json"]
        assert main([*call, "--critic-budget-usd", "0.01"]) == 3
        assert "judgements are kept in" in capsys.readouterr().err
        done = len(rows_of(target.with_name("judged.jsonl.partial")))
        assert 0 < done < 6 and server.counts.total() == done
        assert main([*call, "--dry-run"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["judged_before"], plan["calls"]) == (done, 6 - done)
        assert main(call) == 0
        first = json.loads(capsys.readouterr().out)
        assert server.counts.total() == 6 and first["kept_from_before"] == done
        assert first["cost"]["calls"] == 1.0  # of each judgement that this run made
        rows = rows_of(target)
        assert [(row["label"], row["repeat"], row["question"]) for row in rows] == [
            (1 if i % 2 else -1, 0, f"problem {i}") for i in range(6)
        ]
        for row in rows:
            assert [s["score"] for s in row["scores"]] == [score_of(t, "step") for t in ("3+1=4", "4*2=8")]
        assert main(call) == 0
        again = json.loads(capsys.readouterr().out)
        assert server.counts.total() == 6 and again["cost"]["calls"] is None
        assert again["first_error"] == first["first_error"] and again["kept_from_before"] == 6
        assert main([*call, "--repeats", "2"]) == 0  # the first judgements are there
        assert server.counts.total() == 12 and len(rows_of(target)) == 12
        assert main([*call, "--critic-reasoning-effort", "low"]) == 0  # another critic
        assert server.counts.total() == 18 and "12 judgements made with other settings" in capsys.readouterr().err
        assert main([*call[:2], str(labelled), *call[3:]]) == 2
        assert "is the file of labelled solutions" in capsys.readouterr().err


def test_a_refused_request_is_not_called_transient(tmp_path, no_waits, monkeypatch, capsys):
    async def refuse(server, http, body):
        return failure(400, "no such parameter: temperature")

    monkeypatch.setitem(KINDS, "refuse", refuse)
    source, target = write_traces(tmp_path / "steps.jsonl", 3), tmp_path / "scored.jsonl"
    with FaultServer() as server:
        server.fault_of = lambda body, attempt: "refuse" if "(0+1)*2" in str(body["messages"]) else None
        assert main(words(server, source, target)) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "bad_request 3: these scores stay missing until the settings of the critic change" in said
        assert "no such parameter" in said and "transient" not in said and "run the same command" not in said
        server.fault_of = lambda body, attempt: "error_500" if "(0+1)*2" in str(body["messages"]) else None
        assert main(words(server, source, target, "--critic-retries", "0")) == 0
        assert "3 scores are missing because of transient failures: run the same command again" in " ".join(
            capsys.readouterr().err.split()
        )
        server.fault_of = lambda body, attempt: "refuse"
        assert main(words(server, source, tmp_path / "none.jsonl", "--no-critic-cache")) == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "no step was scored: bad_request 9" in said and "change the settings" in said
        assert "run the same command" not in said


def test_a_silent_server_ends_the_run_with_code_3_and_its_words(tmp_path, no_waits, monkeypatch, capsys):
    monkeypatch.setattr("ssrctl.critics.llm.client.PATIENCE_S", 1.0)
    source, target = write_traces(tmp_path / "steps.jsonl", 400), tmp_path / "scored.jsonl"
    with FaultServer() as server:
        asked = itertools.count()
        server.fault_of = lambda body, attempt: None if next(asked) < 20 else "error_500"
        # long enough that no good reply is late on a busy machine; the patience is at least two of them
        call = words(server, source, target, "--critic-timeout", "1.5", "--critic-retries", "1")
        assert main(call) == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "has given no verdict for" in said and "status 500: the model crashed" in said
        assert "responses are scored and kept" in said and "run the same command again" in said
        kept = rows_of(target.with_name("scored.jsonl.partial"))
        assert not target.exists() and sum(row["scores"][0]["error"] is None for row in kept) == 20
