"""YAML files of options: numbers as people mean them, and a sentence for whatever else a file holds."""

import itertools

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.build import DiffusionOptions, ModelOptions
from guided_diffusion.config_files import LARGEST_FILE, read_mapping
from guided_diffusion.errors import UserError
from guided_diffusion.options import parse_options, read_yaml


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


@pytest.mark.parametrize(("text", "value"), [
    ("010", 10), ("-007", -7), ("0o10", 8), ("0x1F", 31), ("1:10", "1:10"), ("1:10.5", "1:10.5"), ("1_000", "1_000"),
    ("0b11", "0b11"), ("12", 12), ("1.5", 1.5), ("1.", 1.0), ("1.5e-3", 0.0015), ("1e-4", "1e-4"),
    ("-.inf", -float("inf")), ("2024-01-02", "2024-01-02"), ("'010'", "010"), ("true", True), ("no", "no"),
    ("null", None), ("", None), ("1,2", "1,2")])
def test_values_of_the_core_schema(text, value, config):
    read = read_mapping(config(f"value: {text}\n"))["value"]
    assert read == value and isinstance(read, type(value))


@pytest.mark.parametrize(("text", "value"), [
    ("010", "010"), ("0x1F", "0x1F"), ("1.10", "1.10"), (".5", ".5"), ("+1", "+1"), ("25", "25"), ("no", "no"),
    ("off", "off"), ("[25]", None), ("true", None), ("!!binary aGk=", None), ("!!set {a}", None)])
def test_text_is_as_it_is_written(text, value, config):
    argv = ["--config", str(config(f"channel_mult: {text}\n"))]
    if value is None:
        with pytest.raises(UserError, match=r"--channel_mult .*: must be text"):
            parse_options(argv, ModelOptions)
    else:
        assert parse_options(argv, ModelOptions)[0].channel_mult == value


@pytest.mark.parametrize("word", ["yes", "on", "True"])
def test_words_for_true_switch_an_option_on(word, config):
    assert parse_options(["--config", str(config(f"learn_sigma: {word}\n"))], ModelOptions)[0].learn_sigma is True


def test_an_empty_name_of_a_file_of_options_is_refused():
    with pytest.raises(UserError, match="--config: is empty"):
        parse_options(["--config", ""], ModelOptions)


def bomb(levels):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)])


def merging(levels):
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join(lines + [f"a{n}: &a{n}\n  <<: [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)])


@pytest.mark.parametrize(("content", "words"), [
    (bomb(9), "holds more than 100,000 values"), (merging(9), "holds more than 100,000 values"),
    ("a: &a [*a]\n", "holds more than 100,000 values"), ("a: " + "[" * 1000, "nested too deeply"),
    ("a: 1\nb: 2\na: 3\n", "a is given twice, again in line 3"), ("a: {b: 1, b: 2}\n", "b is given twice"),
    ("a: " + "9" * 5000, "has too many digits"), ("a: \0\n", "is not YAML"), (b"\xff\xfe\xff", "is not YAML"),
    ("a: [3\n", "is not YAML"), ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ("? [1]\n: 2\n", "is not YAML"), ("a: !!int x\n", "is not YAML"), ("a: !!timestamp x\n", "is not YAML"),
    ("#" + "a" * LARGEST_FILE, "is larger than 1,000,000 bytes"), ("- a\n", "must hold option names")],
    ids=itertools.count())
def test_what_is_no_file_of_options_is_refused(content, words, config):
    with pytest.raises(UserError, match=words) as refused:
        read_mapping(config(content))
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)


def test_aliases_and_merges_of_a_usual_size_are_read(config):
    assert read_mapping(config("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n"))["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_file_with_an_impossible_name_is_refused(name, config):
    with pytest.raises(UserError, match=r"cannot be read|no name of a file|is not YAML"):
        read_yaml(config('include: "' + name.replace("\0", "\\0") + '"\n'))
    with pytest.raises(UserError, match=r"--config .*(cannot be read|is not YAML)"):
        parse_options(["--config", name], ModelOptions)


def test_text_that_no_file_can_have_as_its_name_is_refused(config):
    for escape in (r"\0", r"\ud800"):
        path = config(f'timestep_respacing: "a{escape}"\n')
        with pytest.raises(UserError, match=r"--timestep_respacing .*must be text without NUL|is not YAML"):
            parse_options(["--config", str(path)], DiffusionOptions)


NAMES = st.sampled_from(["image_size", "num_channels", "timestep_respacing", "include", "evaluation", "<<", "x"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(
        ["&a 1", "*a", "!!int 1", "!!set {1}", "1:10", "010", "0x", "[", "{", "? ", "- ", "'", '"\\ud800"', "|", "%"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)


@fuzz(100)
@given(st.lists(st.tuples(NAMES, VALUES), max_size=4).map(
    lambda pairs: "\n".join(f"{name}: {value}" for name, value in pairs).encode("utf-8", "surrogatepass"))
    | st.binary(max_size=40))
def test_any_file_gives_options_or_a_sentence(config, content):
    try:
        parse_options(["--config", str(config(content))], ModelOptions, DiffusionOptions)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
