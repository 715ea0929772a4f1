"""The recipe: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge import recipe
from kedge.errors import InputError, Problem
from kedge.recipe import Recipe

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "kedge"
SHIPPED = sorted([*(ROOT / "recipes").glob("*.toml"), *(SOURCES / "desk").glob("*.toml")])


def refused(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        recipe.parse(text, overrides, source="mine.toml")
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


# What is accepted


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    recipe.load(path)


def test_an_empty_file_is_the_default_recipe() -> None:
    assert recipe.parse("") == Recipe()


def test_values_arrive_where_they_belong() -> None:
    loaded = recipe.parse(
        'name = "a"\n[policy]\nsteps = 3\nlr = 1\n[policy.kl]\nbeta = 0.5\n[desk]\nannotators.length = -2'
    )
    assert loaded.name == "a"
    assert loaded.policy.steps == 3
    assert isinstance(loaded.policy.lr, float), "a whole number is fine where a number is expected"
    assert loaded.policy.lr == 1.0
    assert loaded.policy.kl.beta == 0.5
    assert loaded.desk.annotators.length == -2.0
    assert loaded.policy.epochs == Recipe().policy.epochs


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().policy.steps = 3  # type: ignore[misc]


def test_a_resolved_recipe_survives_json() -> None:
    given_ = recipe.parse('world = "files"\n[data]\npreferences = "p.csv"\ndemonstrations = "d.csv"', folder=Path("/x"))
    assert Recipe.model_validate_json(given_.model_dump_json()) == given_


def test_defining_the_models_warns_of_nothing() -> None:
    """Pydantic warns when a field such as `model` or `model_...` shadows its own names."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import kedge.recipe"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert recipe.load(path).seed == 3


# Overrides


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("policy.steps=7", lambda r: r.policy.steps == 7),
        ("policy.steps = 7", lambda r: r.policy.steps == 7),
        ("seed=1_000", lambda r: r.seed == 1000),
        ("policy.lr=1e-4", lambda r: r.policy.lr == 1e-4),
        ("policy.lr=.5", lambda r: r.policy.lr == 0.5),
        ("policy.lr=2", lambda r: r.policy.lr == 2.0),
        ("desk.annotators.tone=-1.5", lambda r: r.desk.annotators.tone == -1.5),
        ("policy.whiten=false", lambda r: r.policy.whiten is False),
        ("policy.critic=scalar", lambda r: r.policy.critic == "scalar"),
        ('policy.critic="scalar"', lambda r: r.policy.critic == "scalar"),
        ("policy.kl.mode='adaptive'", lambda r: r.policy.kl.mode == "adaptive"),
        ("name=123", lambda r: r.name == "123"),
        ("name=2024-01-01", lambda r: r.name == "2024-01-01"),
        ("name=true", lambda r: r.name == "true"),
        ("model.init=/models/a=b", lambda r: r.model.init == "/models/a=b"),
    ],
)
def test_override(override: str, read: object) -> None:
    assert callable(read)
    assert read(recipe.parse("", [override]))


def test_overrides_beat_the_file_and_the_last_one_wins() -> None:
    loaded = recipe.parse("[policy.kl]\nbeta = 1\nlimit = 2", ["policy.kl.beta=3", "policy.kl.beta=4"])
    assert (loaded.policy.kl.beta, loaded.policy.kl.limit) == (4.0, 2.0)


@pytest.mark.parametrize(
    "key", [key for key in recipe.keys().values() if key.default is not None], ids=lambda k: k.name
)
def test_every_default_may_be_written_out(key: recipe.Key) -> None:
    written = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
    own, needed = ("regex", "pattern") if key.name.endswith(".function") else ("python", "function")
    text = f"[rewards.polite]\nkind = '{own}'\n{needed} = 'a:b'" if ".NAME." in key.name else ""
    assert recipe.parse(text, [f"{key.name.replace('NAME', 'polite')}={written}"]) == recipe.parse(text)


def test_build_takes_nested_settings() -> None:
    given_ = {"policy": {"kl": {"beta": 1.0}}}
    assert recipe.build(given_, ["policy.lam=1"]).policy.lam == 1.0
    assert given_ == {"policy": {"kl": {"beta": 1.0}}}, "the settings given must not be changed"


# Paths


FILES = 'world = "files"\n[data]\n'


def test_paths_in_the_file_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'{FILES}preferences = "p.csv"\ndemonstrations = "/abs/d.csv"\n[model]\ninit = "folder"')
    loaded = recipe.load(path)
    assert loaded.data.preferences == tmp_path / "p.csv"
    assert loaded.data.demonstrations == Path("/abs/d.csv")
    assert loaded.model.init == str(tmp_path / "folder")


def test_paths_in_overrides_start_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_text(f'{FILES}demonstrations = "d.csv"')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    loaded = recipe.load(tmp_path / "r.toml", ["data.preferences=p.csv", "data.text=~/t.txt"])
    assert loaded.data.preferences == tmp_path / "here" / "p.csv"
    assert loaded.data.text == tmp_path / "home" / "t.txt"
    assert loaded.data.demonstrations == tmp_path / "d.csv"


def test_files_that_are_not_there_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").touch()
    loaded = recipe.parse(
        f'{FILES}preferences = "p.csv"\ndemonstrations = "d.csv"\n[model]\ninit = "folder"', folder=tmp_path
    )
    problems = recipe.missing_files(loaded, "mine.toml")
    assert [problem.where for problem in problems] == ["mine.toml: data.demonstrations", "mine.toml: model.init"]
    assert str(tmp_path / "d.csv") in problems[0].what
    assert recipe.missing_files(Recipe()) == []


def test_files_with_functions_start_at_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        "[rewards.one]\nkind = 'python'\nfunction = 'judge.py:f'\n"
        "[rewards.two]\nkind = 'python'\nfunction = 'os.path:f'"
    )
    loaded = recipe.load(path)
    assert loaded.rewards["one"].function == f"{tmp_path / 'judge.py'}:f"
    assert loaded.rewards["two"].function == "os.path:f"
    (problem,) = recipe.missing_files(loaded, "r.toml")
    assert problem.where == "r.toml: rewards.one.function"
    (tmp_path / "judge.py").touch()
    assert recipe.missing_files(loaded) == []


# What is refused


def test_every_problem_is_reported_at_once_with_line_key_value_range_and_remedy() -> None:
    problems = refused(
        "seed = true\n"
        "[policy]\n"
        'steps = "12"\n'
        "clp = 0.3\n"
        "[policy.kl]\n"
        "beta = -1\n"
        "[desk.annotators]\n"
        "noise = 2\n"
        "lenght = 1\n",
        "reward.epochs=0",
        "policy.stpes=3",
    )
    by_place = {problem.where: problem for problem in problems}
    assert set(by_place) == {
        "mine.toml:1: seed",
        "mine.toml:3: policy.steps",
        "mine.toml:4: policy.clp",
        "mine.toml:6: policy.kl.beta",
        "mine.toml:8: desk.annotators.noise",
        "mine.toml:9: desk.annotators.lenght",
        "--set reward.epochs=0",
        "--set policy.stpes=3",
    }
    assert by_place["mine.toml:3: policy.steps"].what == '"12" is not allowed: expected a whole number >= 1'
    assert by_place["mine.toml:8: desk.annotators.noise"].what == "2 is not allowed: expected a number >= 0 and <= 1"
    assert by_place["mine.toml:9: desk.annotators.lenght"].remedy == "did you mean desk.annotators.length?"
    assert by_place["--set policy.stpes=3"].remedy == "did you mean policy.steps?"
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("seed = true", "seed", "a whole number"),
        ("seed = -1", "seed", ">= 0"),
        ("seed = 4294967296", "seed", "< 4294967296"),
        ("[policy]\nsteps = 12.0", "policy.steps", "a whole number"),
        ("[policy]\nlr = true", "policy.lr", "a number > 0"),
        ("[policy]\nlr = inf", "policy.lr", "a number > 0"),
        ("[policy]\ngamma = nan", "policy.gamma", "<= 1"),
        ("[desk.annotators]\nlength = inf", "desk.annotators.length", "a number"),
        ("[policy]\nwhiten = 1", "policy.whiten", "true or false"),
        ("[policy]\nwhiten = 'true'", "policy.whiten", "true or false"),
        ("[policy]\ncritic = 'vector'", "policy.critic", '"channels" or "scalar"'),
        ("[policy]\nsteps = [1, 2]", "policy.steps", "a whole number"),
        ("[pairs]\ncandidates = 1", "pairs.candidates", ">= 2"),
        ("[data]\nholdout = 1.0", "data.holdout", "< 1"),
        ("[data]\ntext = ''", "data.text", "a path"),
        ("[data]\ntext = 3", "data.text", "a path"),
        ("[model]\ninit = ''", "model.init", "text"),
        ("name = ''", "name", "letters"),
        ("name = '../x'", "name", "letters"),
        ("name = 3", "name", "letters"),
    ],
)
def test_wrong_values(text: str, key: str, expected: str) -> None:
    problem = only(refused(text))
    assert re.fullmatch(rf"mine\.toml:\d: {re.escape(key)}", problem.where)
    assert expected in problem.what


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("[policy]\nclp = 1", "did you mean policy.clip?"),
        ("[polcy]\nclip = 1", "did you mean policy?"),
        ("beta = 1", "did you mean policy.kl.beta?"),
        ("[policy]\nbeta = 1", "did you mean policy.kl.beta?"),
        ("temperature = 1", "did you mean pairs.temperature or policy.temperature?"),
        ("[trace]\nzzz = 1", "known here: text, keep, probes_every, probes"),
    ],
)
def test_unknown_keys_get_the_nearest_known_one(text: str, remedy: str) -> None:
    assert only(refused(text)).remedy == remedy


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("policy.steps", "has no '='"),
        ("", "has no '='"),
        ("=3", "names no key"),
        ("policy..steps=3", "names no key"),
        ("seed.x=1", "seed is a value, not a section"),
        ("policy.steps.x.y=1", "policy.steps is a value, not a section"),
        ("policy=3", "policy is a section"),
        ("policy.kl={beta=1}", "policy.kl is a section"),
        ("nowhere.x=1", "there is no key nowhere"),
        ("policy.kl.x.y=1", "there is no key policy.kl.x"),
        ("name=", '"" is not allowed'),
        ("data.text=", '"" is not allowed'),
        ("policy.steps=", '"" is not allowed'),
        ("policy.steps=1e3", "1000.0 is not allowed"),
        ("policy.lr=fast", '"fast" is not allowed'),
        ("policy.whiten=True", '"True" is not allowed: expected true or false'),
        ("seed=" + "9" * 5000, "is not allowed"),
    ],
)
def test_wrong_overrides(override: str, what: str) -> None:
    problem = only(refused("", override))
    assert problem.where.startswith("--set")
    assert what in problem.what
    assert problem.remedy
    assert len(str(problem)) < 600


def test_an_override_does_not_hide_what_is_wrong_in_the_file() -> None:
    problem = only(refused("policy = 3", "policy.steps=4"))
    assert problem.where == "mine.toml:1: policy"
    assert "not a section" in problem.what


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed = \n", "mine.toml:1"),
        ("a = 1\nb = [1,,]\n", "mine.toml:2"),
        ("seed = 1\nseed = 2\n", "mine.toml:2"),
        ("x = [1,", "mine.toml"),
    ],
)
def test_what_is_not_toml_is_named_with_its_line(text: str, where: str) -> None:
    problem = only(refused(text))
    assert problem.where == where
    assert "TOML" in problem.what


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError):
        recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "overrides", "keys"),
    [
        ("[model]\nhidden = 65", (), ["mine.toml:2: model.hidden"]),
        ("", ("model.hidden=12",), ["--set model.hidden=12"]),
        ("[policy]\nmax_new_tokens = 96", (), ["mine.toml:2: policy.max_new_tokens"]),
        ("[policy]\nprompts_per_step = 1", (), ["mine.toml:1: policy.minibatches"]),
        ("[policy.kl]\nmode = 'adaptive'\nbeta = 0", (), ["mine.toml:3: policy.kl.beta"]),
        ("[sft]\nsteps = 1\n[pairs]\ncheckpoints = 2", (), ["mine.toml:4: pairs.checkpoints"]),
        ("[data]\ntext = 'a.txt'", (), ["mine.toml:2: data.text"]),
        ("[pairs]\nmethod = 'beam'\ntop_p = 0.9", (), ["mine.toml:3: pairs.top_p"]),
        ("world = 'files'", (), ["mine.toml: data.preferences", "mine.toml: data.demonstrations"]),
        (
            "world = 'files'\n[desk]\ndemonstrations = 3\n[data]\npreferences = 'p'\n[model]\ninit = 'm'",
            (),
            ["mine.toml:2: desk"],
        ),
    ],
)
def test_what_no_single_key_shows(text: str, overrides: tuple[str, ...], keys: list[str]) -> None:
    problems = refused(text, *overrides)
    assert [problem.where for problem in problems] == keys
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("lines", "key", "what"),
    [
        ("weight = 2", "rewards.polite.kind", "is missing"),
        ("kind = 'python'", "rewards.polite.function", "is missing: a python reward needs it"),
        ("kind = 'regex'", "rewards.polite.pattern", "is missing"),
        ("kind = 'http'", "rewards.polite.url", "is missing"),
        ("kind = 'python'\nfunction = 'judge.py'", "rewards.polite.function", "names no function"),
        ("kind = 'python'\nfunction = ':f'", "rewards.polite.function", "names no function"),
        ("kind = 'python'\nfunction = 'a b:f'", "rewards.polite.function", "names no function"),
        ("kind = 'python'\nfunction = 'a.b:f()'", "rewards.polite.function", "names no function"),
        ("kind = 'python'\nfunction = '.a:f'", "rewards.polite.function", "names no function"),
        (
            "kind = 'regex'\npattern = 'ab(c'",
            "rewards.polite.pattern",
            "missing ), unterminated subpattern at position 2",
        ),
        ("kind = 'regex'\npattern = 'a{99999999999}'", "rewards.polite.pattern", "the repetition number is too large"),
        ("kind = 'regex'\npattern = '\\l'", "rewards.polite.pattern", "bad escape"),
        ("kind = 'http'\nurl = 'ftp://a/b'", "rewards.polite.url", "not the address of an HTTP service"),
        ("kind = 'http'\nurl = 'localhost:80/b'", "rewards.polite.url", "not the address"),
        ("kind = 'http'\nurl = 'http://:80/b'", "rewards.polite.url", "not the address"),
        ("kind = 'http'\nurl = 'http://a:99999/b'", "rewards.polite.url", "not the address"),
        ("kind = 'http'\nurl = 'http://[::1/b'", "rewards.polite.url", "not the address"),
        ('kind = "http"\nurl = "http://a/\\n"', "rewards.polite.url", "not the address"),
        ("kind = 'regex'\npattern = 'a'\nretries = 1", "rewards.polite.retries", "is not read by a regex reward"),
        ("kind = 'http'\nurl = 'http://a'\nfunction = 'a:b'", "rewards.polite.function", "is not read"),
    ],
)
def test_rewards_that_cannot_be(lines: str, key: str, what: str) -> None:
    problem = only(refused(f"[rewards.polite]\n{lines}"))
    assert problem.where.rpartition(" ")[2] == key
    assert what in problem.what and problem.remedy


@pytest.mark.parametrize("name", ["score", "kl", "length", "missing_eos", "critic", "whitening"])
def test_the_names_of_built_in_channels_are_taken(name: str) -> None:
    problem = only(refused(f"[rewards.{name}]\nkind = 'regex'\npattern = 'a'"))
    assert problem.where == f"mine.toml:1: rewards.{name}"


@pytest.mark.parametrize("name", ["Polite", "a-b", "9x", '"a.b"', '""', '"é"'])
def test_names_of_rewards_are_plain(name: str) -> None:
    assert "is no name" in only(refused(f"[rewards.{name}]\nkind = 'regex'\npattern = 'a'")).what


def test_a_secret_in_an_address_is_not_told() -> None:
    problem = only(refused("[rewards.a]\nkind = 'http'\nurl = 'gopher://me:hush@host/'"))
    assert "hush" not in str(problem)


def test_a_gpt2_head_may_have_odd_width() -> None:
    assert recipe.parse("", ["model.family=gpt2", "model.hidden=12"]).model.hidden == 12


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(sorted(recipe.keys())), min_size=1))
def test_exactly_the_wrong_keys_are_named(names: set[str]) -> None:
    """A list fits nowhere: whichever keys hold one, those and no others are reported."""
    nested: dict[str, object] = {}
    names = {name.replace("NAME", "polite") for name in names}
    for name in names:
        *sections, last = name.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})  # type: ignore[assignment]
        table[last] = [1]
    if "rewards" in nested and "rewards.polite.kind" not in names:
        nested["rewards"]["polite"]["kind"] = "regex"  # type: ignore[index]
    with pytest.raises(InputError) as caught:
        recipe.build(nested)
    assert {problem.where for problem in caught.value.problems} == {f"recipe: {name}" for name in names}


# Nothing is undocumented, nothing is dead


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in recipe.keys().values() if not key.meaning] == []


def test_the_documentation_lists_exactly_the_keys() -> None:
    documented = []
    section = ""
    for line in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("`[]") + "." if "[" in line else ""
        elif line.startswith("| `"):
            documented.append(f"{section}{line.removeprefix('| ')}")
    expected = [_row(key) for key in recipe.keys().values()]
    assert sorted(documented) == sorted(expected), "docs/recipe.md differs from recipe.py"


def _row(key: recipe.Key) -> str:
    section, _, name = key.name.rpartition(".")
    shown = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
    default = "" if key.default in (None, "") else f"`{shown}`"
    return f"{section + '.' if section else ''}`{name}` | {key.allowed} | {default} | {key.meaning} |"


def test_every_key_is_read_somewhere() -> None:
    """A setting that no code reads is a lie; its name must appear as an attribute that is read outside of `recipe`."""
    read = {
        node.attr
        for path in SOURCES.rglob("*.py")
        if SOURCES / "recipe" not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert [key.name for key in recipe.keys().values() if key.name.rpartition(".")[2] not in read] == []
