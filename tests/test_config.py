"""Configs: the shipped ones, and what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from metahpo.config import LEARNERS
from metahpo.config_file import dump_config, load_config
from metahpo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Those of `metahpo train`; the other commands' tests have theirs.
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("digits", "search"))
POLICIES = [path for path in SHIPPED if path.parent.name in ("navigation", "pendulum", "half_cheetah")]
FEW_SHOT = [path for path in SHIPPED if path not in POLICIES]

MINIMAL = """
data: {source: glyphs, ways: 3}
net: {name: conv4, filters: 4}
learner: {name: maml, steps: 1}
training: {epochs: 2, lr: 1e-3}
"""


@pytest.fixture
def config(tmp_path):
    """Writes text as a config file and gives its path."""

    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def errors(path: Path, *overrides: str) -> list[str]:
    """The lines of the ConfigError that loading raises, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_there_are_shipped_configs():
    assert len(SHIPPED) >= 10
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_shipped_config_of_a_policy_loads(path):
    config = load_config(path)
    assert config.learner.name == "policy_maml"
    assert config.learner.first_order == (path.stem == "fomaml")
    assert path.parent.name in (config.data.source, "pendulum", config.data.model_dump().get("environment", "")[:12])


@pytest.mark.parametrize("path", FEW_SHOT, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_shipped_config_loads_and_is_what_its_name_says(path):
    config = load_config(path)
    parts = path.relative_to(CONFIGS).parts[0].split("_")
    numbers = [re.fullmatch(r"(\d+)(?:to(\d+))?(way|shot)", part) for part in parts]
    source = "_".join(part for part, number in zip(parts, numbers) if not number)
    assert config.data.source == {"mini_imagenet": "folder"}.get(source, source)
    found = {m[3]: (int(m[1]), int(m[2])) if m[2] else int(m[1]) for m in numbers if m}
    assert found == {kind: getattr(config.data, f"{kind}s") for kind in found}
    assert "shot" in found
    if path.stem in LEARNERS:
        assert config.learner.name == path.stem


def test_every_learner_has_a_config_that_differs_in_the_learner_alone():
    configs = {path.stem: load_config(path) for path in (CONFIGS / "glyphs_5way_1shot/learners").glob("*.yaml")}
    assert {config.learner.name for config in configs.values()} == set(LEARNERS) - {"custom", "policy_maml"}
    assert len({str(config.model_copy(update={"learner": None})) for config in configs.values()}) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_dumped_config_is_read_as_the_same(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_a_dump_spells_out_defaults_and_keeps_strings_that_look_like_numbers(config, tmp_path):
    text = MINIMAL.replace(
        "{name: conv4, filters: 4}", "{name: 'own:net', args: {a: '1e-3', b: 1e-3, c: '2024-01-01'}}"
    )
    loaded = load_config(config(text))
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    again = load_config(tmp_path / "config.yaml")
    assert again.net.args == {"a": "1e-3", "b": 0.001, "c": "2024-01-01"}
    assert again == loaded
    assert yaml.safe_load(dump_config(loaded))["training"]["val_tasks"] == 600


def test_a_bare_name_means_its_defaults(config):
    loaded = load_config(config("data: glyphs\nnet: mlp\nlearner: maml_pp\ntraining:\n"))
    assert (loaded.data.ways, loaded.net.hidden, loaded.learner.steps, loaded.training.tasks) == (5, (40, 40), 5, 8)
    assert loaded.run_dir is None
    assert load_config(config("data: glyphs\nnet: resnet12\nlearner: maml\n")).net.widths == (64, 128, 256, 512)


def test_overrides_change_add_and_replace(config):
    loaded = load_config(
        config(), ["net=mlp", "net.hidden=[8, 9]", "training.lr=2e-2", "learner.inner_lr=.5", "run_dir=2024-05-17"]
    )
    assert (loaded.net.name, loaded.net.hidden) == ("mlp", (8, 9))
    assert (loaded.training.lr, loaded.training.epochs, loaded.learner.inner_lr) == (0.02, 2, 0.5)
    assert loaded.run_dir == Path("2024-05-17")
    assert load_config(config("data: glyphs\nnet: mlp\nlearner: maml\n"), ["training.seed=3"]).training.seed == 3


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2", "0.001"])
def test_numbers_with_exponents_are_numbers(config, text):
    assert load_config(config(MINIMAL.replace("1e-3", text))).training.lr == 0.001


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("net.fliters=3", "unknown key 'net.fliters'; did you mean 'filters'?"),
        ("net.hidden=[3]", "unknown key 'net.hidden'; known: name, filters, slope"),
        ("training.epoch=3", "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ("trainin.epochs=3", "unknown key 'trainin'; did you mean 'training'?"),
        ("data..ways=3", "unknown key 'data.'"),
        ("data=glyfs", "data.source: did you mean 'glyphs'?"),
        ("learner=mmaml", "learner.name: did you mean 'maml'? should be one of maml, maml_pp, anil,"),
        ("net=3", "net: should be a name or a section, found 3"),
        ("net={}", "key 'net.name' is missing; one of conv4, resnet12, mlp, or MODULE:NAME of your own"),
        ("net=my net:f", "net.name: should be MODULE:NAME, found 'my net:f'"),
        ("data={source: folder}", "key 'data.root' is missing"),
        (
            "net.filters=abc",
            "net.filters: should be a valid integer, unable to parse string as an integer, found 'abc'",
        ),
        ("net={name: mlp, hidden: [4, 0]}", "net.hidden.1: should be greater than or equal to 1, found 0"),
        ("net={name: resnet12, widths: [4, 5]}", "net.widths: "),
        ("training=5", "training: should be a section of keys, found 5"),
        ("training.lr=-1", "training.lr: should be greater than 0, found -1"),
        ("training.lr=.inf", "training.lr: should be finite, found inf"),
        ("training.epochs=1.5", "training.epochs: should be a valid integer"),
        ("training.epochs=true", "training.epochs: should be a number, found True"),
        ("training.epochs='3'", "training.epochs: should be a number, found '3'"),
        ("learner.remat=0", "learner.remat: should be none, sqrt or a number of steps of at least 1, found 0"),
        ("learner.remat='2'", "learner.remat: should be none, sqrt or a number of steps of at least 1, found '2'"),
        ("learner.inner_gradient=dual", "learner.inner_gradient: should be 'reverse' or 'mixed', found 'dual'"),
        ("training.precision=fp16", "training.precision: should be 'float32', 'tf32' or 'bf16', found 'fp16'"),
        ("learner.first_order='no'", "learner.first_order: should be true or false, found 'no'"),
        (
            "training.engine=lop",
            "training.engine: should be 'auto', 'loop', 'threads', 'vmap', 'trace' or 'graph', found 'lop'",
        ),
        ("training.optimizer=Adma", "training.optimizer: torch.optim has no optimizer 'Adma'"),
        ("training.device=gpu", "training.device: 'gpu' is not a torch device"),
        ("data.ways=1", "data.ways: should be greater than or equal to 2, found 1"),
        ("run_dir=3", "run_dir: should be a path, found 3"),
        ("run_dir=''", "run_dir: should be a path or null, found ''"),
        ("=3", "'=3' is not an override; expected KEY.SUB=VALUE"),
        ("data", "'data' is not an override; expected KEY.SUB=VALUE"),
        ("net.filters=[", "the value in 'net.filters=[' is not YAML"),
        ("net.name.x=3", "'net.name.x=3': 'name' is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(config, override, expected):
    (line,) = errors(config(), override)
    assert line.startswith(expected)


def test_no_cuda_is_said(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert errors(config(), "training.device=cuda") == [
        "training.device: this machine has no CUDA device, found 'cuda'"
    ]


def test_all_errors_come_at_once(config):
    text = MINIMAL.replace("ways: 3", "ways: 1").replace("filters: 4", "fliters: 4").replace("lr: 1e-3", "lr: 0")
    assert sorted(errors(config(text + "dta: 1\n"))) == [
        "data.ways: should be greater than or equal to 2, found 1",
        "training.lr: should be greater than 0, found 0",
        "unknown key 'dta'; did you mean 'data'?",
        "unknown key 'net.fliters'; did you mean 'filters'?",
    ]
    text = "data: glyphs\nnet: conv4\nlearner: maml\ntraining: {epochs: true, tasks: '2', lr: .inf}\n"
    assert len(errors(config(text))) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; expected keys data, net, learner, training, run_dir"),
        ("- 1\n", "holds [1]; expected keys data"),
        ("just words\n", "holds 'just words'; expected keys data"),
        ("a: [1\n", "is not YAML: while parsing a flow sequence"),
        ("data: glyphs\nnet: mlp\ndata: sinusoid\n", "is not YAML: key 'data' is given twice"),
        ("training: {lr: 1, lr: 2}\n", "is not YAML: key 'lr' is given twice"),
        ("? [1, 2]\n: 3\n", "is not YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML: tag '!!python/object/apply:os.getcwd' makes no"),
        (f"a: {'9' * 5000}\n", "is not YAML: Exceeds the limit"),
        (f"a: {'[' * 2000}{']' * 2000}\n", "is not YAML: it is nested too deep"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(config, text, expected):
    path = config(text)
    (line,) = errors(path)
    assert line.startswith(f"config {path} {expected}")


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert errors(tmp_path / "none.yaml") == [f"cannot read config {tmp_path / 'none.yaml'}: No such file or directory"]
    assert errors(tmp_path) == [f"cannot read config {tmp_path}: Is a directory"]
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    assert errors(tmp_path / "binary.yaml") == [f"config {tmp_path / 'binary.yaml'} is not text"]
    assert errors(Path("a\0b"))[0].startswith("cannot read config 'a\\x00b'")


def test_missing_sections_are_named(config):
    assert errors(config("data: glyphs\n")) == ["key 'net' is missing", "key 'learner' is missing"]
