"""YAML as plain values: what is read, and what is refused."""

from __future__ import annotations

import math
import os

import pytest

from metahpo import yaml_text
from metahpo.config_file import load_config
from metahpo.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2024-05-17", "2024-05-17"),
        ("=", "="),
        ("1e-3", 0.001),
        ("12e03", 12000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("1e", "1e"),
        ("!!str 010", "010"),
        ("!!float 3", 3.0),
        ("", None),
    ],
)
def test_numbers_are_what_people_write(text, value):
    read = yaml_text.parse(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *("010", "08", "1:30", "1e-3", "yes", "null", "~", "", "=", ".5", "0x1F", "1_0", "<<", "- a", ".inf", "é\n$"),
        *(1e-7, 1e22, 5e-324, 10**20, True, None, [1, [2.5]], {"a": {}}),
    ],
)
def test_what_is_dumped_is_read_as_the_same(value):
    read = yaml_text.parse(yaml_text.dump({"key": value}))["key"]
    assert read == value
    assert type(read) is type(value)


def bomb(line: str, inside: str) -> str:
    lines = [f"a0: &a0 {inside}"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} " + line % ", ".join([f"*a{level - 1}"] * 10))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb("[%s]", "[x]"), "its aliases expand to more than 100,000 values"),
        (bomb("{<<: [%s]}", "{x: 1}"), "its aliases expand to more than 100,000 values"),
        ("a: &x [*x]", "an alias lies within what it repeats (line 1, column 4)"),
        ("a: &x {b: {c: *x}}", "an alias lies within what it repeats"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("[" * 3000, "nested too deep"),
        ("a: 1e999", "'1e999' is too large a number (line 1, column 4)"),
        ("!!int ''", "'' is not a whole number"),
        ("!!bool perhaps", "'perhaps' is not true or false"),
        ("!!null 3", "'3' is not null"),
        ("!!float x", "'x' is not a number"),
        ("!!set {a}", "tag '!!set' makes no plain value"),
        ("!!map [a]", "tag '!!map' makes no plain value"),
        ("!!binary aaaa", "tag '!!binary' makes no plain value"),
        ("!mine 3", "tag '!mine' makes no plain value"),
        ("{a: 1, a: 2}", "key 'a' is given twice"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: <<", "'tag:yaml.org,2002:merge'"),
        ("- 1\n---\n- 2", "another document (line 2, column 1)"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_what_is_no_plain_value_is_refused_in_one_line(text, expected):
    with pytest.raises(ValueError) as caught:
        yaml_text.parse(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


def test_what_an_alias_repeats_is_a_copy():
    read = yaml_text.parse("a: &x {b: [1]}\nc: *x\nd: {<<: *x, e: 2}")
    assert read == {"a": {"b": [1]}, "c": {"b": [1]}, "d": {"b": [1], "e": 2}}
    read["a"]["b"].append(2)
    assert read["c"] == {"b": [1]} and read["d"]["b"] == [1]


def test_a_file_that_never_ends_is_not_read(tmp_path):
    pipe, large = tmp_path / "pipe.yaml", tmp_path / "large.yaml"
    os.mkfifo(pipe)
    large.write_bytes(b"#" * (yaml_text.MOST_BYTES + 1))
    for path, expected in ((pipe, ": Not a regular file"), (large, " is too large: 1,000,001 bytes")):
        with pytest.raises(ConfigError, match=f"config {path}{expected}"):
            load_config(path)


RUN = "data: {source: glyphs}\nnet: {name: conv4}\nlearner: {name: maml}\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"training.epochs={'x' * 10_000}", "training.epochs: should be a valid integer"),
        (f"training.optimizer={'x' * 10_000}", "training.optimizer: torch.optim has no optimizer"),
        (f"{'k' * 10_000}=3", "unknown key"),
        (f"net.filters=[{'1, ' * 3000}1]", "net.filters: should be a valid integer"),
        (f"net.filters={{{', '.join(f'k{i}: {i}' for i in range(3000))}}}", "net.filters: should be a valid integer"),
        (f"training.seed={10**30}", "training.seed: should be below 2^63"),
        ("training.optimizer_args={betas: [0.9, .inf]}", "training.optimizer_args.betas.1: should be finite"),
        ("training.threads=100000", "training.threads: should be less than or equal to 1024, found 100000"),
    ],
)
def test_a_wrong_value_is_shown_in_part(tmp_path, override, expected):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    (line,) = str(caught.value).splitlines()
    assert expected in line
    assert len(line) < 1100


def test_a_thousand_mistakes_are_counted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN + "\n".join(f"key{i}: 1" for i in range(1000)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 31
    assert lines[-1].endswith("and 970 more errors")
