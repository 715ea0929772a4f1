"""What the audit says: sick files alarm, healthy ones do not, too little data is told, and no file breaks it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import finding, pair, write

from kedge import cli
from kedge.data.audit.findings import ORDER
from kedge.data.audit.lines import lines
from kedge.data.audit.whole import as_json, audit
from kedge.errors import InputError, Interrupted
from kedge.progress import Interrupt

TEXT = "the a pen ship rope sail knot wind tide mast deck hull"
WORDS = TEXT.split()
ROWS = 400


def text(rng: np.random.Generator, size: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), size))


def coins(
    seed: int = 0, rows: int = ROWS, lean: Callable[[str, str], float] = lambda a, b: 0.0
) -> list[dict[str, Any]]:
    """Pairs labelled by a coin that leans, in log-odds, towards the response shown first."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(rows):
        first, second = (text(rng, int(size)) for size in rng.integers(3, 40, 2))
        wins = rng.random() < 1 / (1 + math.exp(-lean(first, second)))
        chosen, rejected = (first, second) if wins else (second, first)
        found.append(pair(f"prompt {number // 2}", chosen, rejected, chosen_pos=1 if wins else 2))
    return found


def test_unbiased_labels_do_not_alarm(tmp_path: Path) -> None:
    found = audit(write(tmp_path / "rows.jsonl", coins()))
    for name in ("length_bias", "position_bias", "cycles", "drift", "duplicates", "rejected", "identical", "empty"):
        assert finding(found, name).status in ("ok", "not_checked"), name
    assert finding(found, "length_bias").status == finding(found, "position_bias").status == "ok"


def test_length_bias_of_either_sign_is_told_in_words(tmp_path: Path) -> None:
    def longer(a: str, b: str) -> float:
        return 1.5 * math.log(len(a) / len(b))

    up = finding(audit(write(tmp_path / "up.jsonl", coins(lean=longer))), "length_bias")
    down = finding(audit(write(tmp_path / "down.jsonl", coins(lean=lambda a, b: -longer(a, b)))), "length_bias")
    assert up.status == down.status == "bad"
    assert "write longer" in up.effect and "negative" in down.effect and "brevity" in down.effect
    assert '"two_head"' in up.remedy and up.evidence["slope"] > 1 and down.evidence["slope"] < -1


def test_position_bias_alarms(tmp_path: Path) -> None:
    found = finding(audit(write(tmp_path / "rows.jsonl", coins(lean=lambda a, b: 0.8))), "position_bias")
    assert found.status == "bad" and found.evidence["first_wins"] > 0.6


def test_a_domain_that_gives_the_label_away_alarms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"p{i}", "response": text(rng, 8), "label": bool(rng.random() < (0.86, 0.16)[i % 2]),
         "domain": ("coffee", "cinema")[i % 2]}
        for i in range(ROWS)
    ]  # fmt: skip
    found = finding(audit(write(tmp_path / "rows.jsonl", rows)), "domain")
    assert found.status == "bad" and "coffee" in found.says and "cinema" in found.says
    assert "not the quality" in found.effect


def test_an_unrelated_domain_does_not_alarm(tmp_path: Path) -> None:
    rows = [row | {"source": f"s{number % 3}"} for number, row in enumerate(coins())]
    assert finding(audit(write(tmp_path / "rows.jsonl", rows)), "domain").status == "ok"


def test_coin_tosses_on_tournaments_are_all_cycles(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for prompt in range(30):
        for a in range(5):
            for b in range(a):
                ends = (f"x{a}", f"x{b}")
                rows.append(pair(f"p{prompt}", *(ends if rng.random() < 0.5 else ends[::-1])))
    assert finding(audit(write(tmp_path / "coins.jsonl", rows)), "cycles").status == "bad"
    ordered = [
        row if row["chosen"] < row["rejected"] else pair(row["prompt"], row["rejected"], row["chosen"]) for row in rows
    ]
    found = finding(audit(write(tmp_path / "order.jsonl", ordered)), "cycles")
    assert found.status == "ok" and found.evidence["cyclic"] == 0


def test_leakage_is_found_exact_and_near(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    prompts = [text(rng, 30) for _ in range(60)]
    rows = [pair(prompt, f"yes {i}", f"no {i}") for i, prompt in enumerate(prompts[:40])]
    held = [pair(prompt, f"good {i}", f"ill {i}") for i, prompt in enumerate(prompts[40:])]
    train = write(tmp_path / "train.jsonl", rows)
    apart = audit(train, evaluation=write(tmp_path / "apart.jsonl", held))
    assert finding(apart, "leakage").status == "ok"
    leaky = [*held, pair(prompts[0], "a", "b"), pair(prompts[1] + " now", "c", "d"), pair("new", "yes 3", "e")]
    found = audit(train, evaluation=write(tmp_path / "leaky.jsonl", leaky))
    assert finding(found, "leakage").status == "bad"
    assert found.leakage is not None
    assert found.leakage.shared_prompts == pytest.approx(1 / 23)
    assert found.leakage.near_prompts.alike == 1
    assert found.leakage.shared_responses == pytest.approx(1 / 46)
    assert "no evaluation file" in finding(audit(train), "leakage").says.lower()


def test_shift_is_seen_where_there_is_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    train = write(tmp_path / "train.jsonl", [pair(text(rng, 12), "a", f"b{i}") for i in range(300)])
    same = write(tmp_path / "same.jsonl", [{"prompt": text(rng, 12)} for _ in range(300)])
    other = write(tmp_path / "other.jsonl", [{"prompt": text(rng, 8) + " invoice tax form"} for _ in range(300)])
    calm, alarmed = audit(train, against=same), audit(train, against=other)
    assert finding(calm, "shift").status == "ok"
    assert calm.shift is not None and calm.shift.auc_ci is not None and calm.shift.auc_ci[0] < 0.56
    assert finding(alarmed, "shift").status == "bad"
    assert alarmed.shift is not None and alarmed.shift.auc == pytest.approx(1.0, abs=0.01)
    assert 0.2 < alarmed.shift.unknown_words < 0.35
    few = audit(train, against=write(tmp_path / "few.jsonl", [{"prompt": "one"}]))
    assert finding(few, "shift").status in ("not_checked", "look") and few.shift is not None and few.shift.auc is None


def test_one_row_is_enough_to_say_that_it_is_not_enough(tmp_path: Path) -> None:
    for row in (pair("p", "a", "bb"), {"prompt": "p", "response": "r", "rating": 1},
                {"prompt": "p", "response": "r", "label": True}, pair("p", "a", "b", tie=True),
                {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}):  # fmt: skip
        found = audit(write(tmp_path / "rows.jsonl", [row]))
        assert {one.status for one in found.findings} <= {"ok", "not_checked"}
        assert all(one.says for one in found.findings)
        json.dumps(as_json(found))


def test_a_mixed_file_is_told(tmp_path: Path) -> None:
    rows = [pair("p", "a", "b"), {"prompt": "p", "response": "r", "label": True}]
    assert finding(audit(write(tmp_path / "rows.jsonl", rows)), "kinds").status == "look"


def test_a_request_to_stop_is_heard(tmp_path: Path) -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    with pytest.raises(Interrupted, match="run the command again"):
        audit(write(tmp_path / "rows.jsonl", coins(rows=5)), interrupt=interrupt)


def test_findings_are_worst_first_and_say_what_to_do(tmp_path: Path) -> None:
    rows = coins(lean=lambda a, b: 1.5 * math.log(len(a) / len(b)))
    found = audit(write(tmp_path / "rows.jsonl", [*rows, *rows[:60], pair("p", "same", "same")]))
    ranks = [ORDER.index(one.status) for one in found.findings]
    assert ranks == sorted(ranks) and ranks[0] == 0
    for one in found.findings:
        assert bool(one.effect) == bool(one.remedy) == (one.status in ("bad", "look")), one.name
    text_lines = lines(found)
    assert max(map(len, text_lines)) <= 80
    assert text_lines[text_lines.index("") + 1].startswith("bad ")


def test_what_a_remedy_names_exists() -> None:
    from kedge.data.audit import words
    from kedge.recipe import sections

    text = Path(words.__file__).read_text(encoding="utf-8")
    fields = sections.Reward.model_fields
    for name in set(re.findall(r"reward\.(\w+)", text)):
        assert name in fields
    for name, option in re.findall(r"reward\.(\w+) = \"(\w+)\"", text):
        assert option in str(fields[name].annotation)


@settings(max_examples=25)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "prompt": st.sampled_from(["p", "q", "rr"]),
                "chosen": st.text(max_size=6),
                "rejected": st.text(max_size=6),
            },
            optional={
                "strength": st.floats(0, 1),
                "annotator": st.sampled_from(["me", "you\x1b[31m", "<b>"]),
                "domain": st.none() | st.sampled_from(["x", "y", ""]),
                "chosen_pos": st.sampled_from([0, 1, 2]),
            },
        ),
        min_size=1,
        max_size=40,
    )
)
def test_no_file_breaks_the_audit(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path_factory.mktemp("any") / "rows.jsonl", rows)
    try:
        found = audit(path)
    except InputError:
        return  # no row was usable
    assert found.tables.total == len(rows) == len(found.tables.rows) + found.tables.rejected_count
    assert all(line.isprintable() for line in lines(found))
    json.dumps(as_json(found))


def run(*arguments: str) -> int:
    return cli.main(["data", "audit", *arguments])


def test_the_command_prints_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "rows.jsonl", [*coins(), {"prompt": "p"}]))
    assert run(path) == 0
    text_out = capsys.readouterr().out
    assert "length bias" in text_out and "\x1b" not in text_out and "rows.jsonl:401" in text_out.replace("\n", "")
    assert run(path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rejected"], found["duplicates"], found["empty"]) == (401, 1, 0, 0)
    assert {"longer_wins", "slope", "slope_ci", "length_only_accuracy"} <= found["length_bias"].keys()
    assert {"first_wins", "ci"} <= found["position_bias"].keys()
    assert found["position_bias"]["first_wins"] == pytest.approx(0.5, abs=0.1)
    assert len(found["findings"]) == 17


def test_what_is_not_known_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r", "label": True}])
    assert run(str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["position_bias"] == {"first_wins": None, "ci": None}
    assert set(found["length_bias"].values()) == {None} and found["shift"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "no rows in it"), ('{"question": "q"}\n', "the columns are question"), ("{\n", "not readable as JSON")],
)
def test_unusable_files_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str], content, said) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert run(str(path)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert run(str(tmp_path / "none.jsonl")) == 2 and run(str(path), "--html", "page.txt") == 2


def test_other_formats(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = coins(rows=60)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    paths = [write(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet", tmp_path / "rows.csv"]
    found = [as_json(audit(path)) | {"file": ""} for path in paths]
    assert found[0] == found[1] == found[2]
