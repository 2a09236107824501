"""Typed options: types, ranges, YAML files, precedence, and messages that name what is wrong."""

import dataclasses
import enum
import importlib
import pkgutil
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import pytest

import guided_diffusion
from guided_diffusion.errors import UserError
from guided_diffusion.options import (
    Options,
    fill,
    nearest,
    option,
    option_fields,
    options_from,
    parse_bool,
    parse_options,
    read_yaml,
)


@dataclass(frozen=True)
class Network(Options):
    """A network."""

    width: int = option(64, "channels, 100 % of them", minimum=1, maximum=512)
    dropout: float = option(0.0, "probability", minimum=0, maximum=1)
    rate: float = option(1e-3, "learning rate", above=0)
    pool: str = option("mean", "mean or max", choices=("mean", "max"))
    class_cond: bool = option(False, "takes labels")
    levels: str = option("", "comma-separated multipliers")
    stop: int | None = option(None, "step to stop at", minimum=0)
    colour: str = option("", "of the pages", old_names=("tint",))


@dataclass(frozen=True)
class Process(Options):
    """A process."""

    steps: int = option(1000, "steps", minimum=1)
    class_cond: bool = option(False, "takes labels")


def network(*argv, **keywords):
    return parse_options(list(argv), Network, **keywords)[0]


def refusal(*argv, **keywords):
    with pytest.raises(UserError) as caught:
        network(*argv, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)
    return write


# Types


def test_defaults_hold_without_arguments():
    assert network() == Network()


def test_values_get_the_type_of_their_option():
    got = network("--width", "32", "--dropout", "1", "--rate", "1e-4", "--levels", "1,2", "--stop", "7")
    assert got == Network(width=32, dropout=1.0, rate=1e-4, levels="1,2", stop=7)
    assert isinstance(got.dropout, float)
    assert network("--width=32", "--rate=2").rate == 2.0


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "t", "yes", "1"])
def test_spellings_of_true(text):
    assert network("--class_cond", text).class_cond is True


@pytest.mark.parametrize("text", ["False", "false", "FALSE", "f", "no", "0"])
def test_spellings_of_false(text):
    assert network("--class_cond", text).class_cond is False


def test_a_bare_flag_is_true_also_before_another_flag():
    got = network("--class_cond", "--width", "32")
    assert got.class_cond is True and got.width == 32
    assert network("--class_cond").class_cond is True


def test_parse_bool_refuses_other_words():
    for word in ("maybe", "", "2", "None"):
        with pytest.raises(ValueError, match="neither True nor False"):
            parse_bool(word)


@pytest.mark.parametrize("text", ["", "None", "none"])
def test_an_optional_option_can_be_unset(text):
    assert network("--stop", text).stop is None
    assert network("--stop", "0").stop == 0


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("width", "wide", "a whole number"),
    ("width", "1.5", "a whole number"),
    ("width", 1.5, "a whole number"),
    ("width", True, "a whole number"),
    ("width", None, "a whole number"),
    ("width", "", "a whole number"),
    ("width", [1], "a whole number"),
    pytest.param("width", 10**400, "a whole number", id="width-huge"),
    ("dropout", "high", "a number"),
    ("dropout", "nan", "a number"),
    ("dropout", float("inf"), "a number"),
    ("rate", "inf", "a number"),
    ("rate", False, "a number"),
    ("class_cond", "perhaps", "True or False"),
    ("class_cond", 2, "True or False"),
    ("class_cond", None, "True or False"),
    ("levels", [1, 2], "text"),
    ("levels", {"a": 1}, "text"),
    ("levels", None, "text"),
    ("stop", "soon", "a whole number"),
    ("stop", True, "a whole number"),
])
def test_a_value_of_another_type_is_refused(name, value, allowed):
    with pytest.raises(UserError) as caught:
        Network(**{name: value})
    assert str(caught.value) == f"--{name} {value!r}: must be {allowed}"


def test_whole_numbers_may_be_written_as_floats_and_text_as_numbers():
    assert Network(width=32.0).width == 32
    assert Network(levels=8).levels == "8"


# Ranges


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("width", 0, "at least 1"),
    ("width", -3, "at least 1"),
    ("width", 513, "at most 512"),
    ("dropout", -0.1, "at least 0"),
    ("dropout", 1.01, "at most 1"),
    ("rate", 0.0, "greater than 0"),
    ("pool", "median", "one of mean, max"),
    ("stop", -1, "at least 0"),
    ("stop", 10**11, "at most 10000000000"),
])
def test_a_value_out_of_range_is_refused(name, value, allowed):
    message = refusal(f"--{name}", str(value))
    assert message == f"--{name} {value}: must be {allowed}"


def test_the_ends_of_a_range_are_allowed():
    assert network("--width", "512", "--dropout", "1", "--stop", "0").width == 512
    assert network("--width", "1", "--dropout", "0").width == 1


# Command line


def test_an_unknown_flag_is_told_the_nearest_name():
    assert refusal("--widht", "3") == "--widht: no such option (did you mean --width?)"
    assert refusal("--widht=3") == "--widht: no such option (did you mean --width?)"
    assert refusal("--zzzzz", "3") == "--zzzzz: no such option"
    assert refusal("--width") == "--width: a value is missing"
    assert refusal("stray") == "stray: stands where an option is expected"


def test_a_prefix_of_a_flag_is_not_that_flag():
    assert "no such option" in refusal("--wid", "3")


def test_a_flag_without_its_value_is_refused():
    assert "--width" in refusal("--width")


def test_a_negative_value_is_a_value():
    assert refusal("--width", "-3") == "--width -3: must be at least 1"


def test_one_flag_sets_the_option_in_every_class_that_has_it():
    first, second = parse_options(["--class_cond", "True", "--steps", "10"], Network, Process)
    assert first.class_cond is True and second.class_cond is True and second.steps == 10


@pytest.mark.parametrize("read", [lambda *classes: parse_options([], *classes),
                                  lambda *classes: fill({}, classes, None, source="here"),
                                  lambda *classes: options_from({}, *classes)], ids=["command", "file", "flags"])
def test_one_name_of_two_different_options_is_refused(read):
    @dataclass(frozen=True)
    class Wider(Options):
        """Another width."""

        width: int = option(3, "of the blur")

    with pytest.raises(UserError) as refused:
        read(Network, Process, Wider)
    assert str(refused.value) == ("--width: Network and Wider state two different options of that name; rename the one "
                                  "of the class that was added")


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(("kind", "default", "said"), [
    (list[str], "", r"list\[str\]"), (tuple[int, ...], (), r"tuple\[int, \.\.\.\]"), (dict, None, "dict"),
    (Path, "", "Path"), (Path | None, None, r"pathlib\.Path \| None"), (int | str, 0, r"int \| str"),
    (int | str | None, 0, r"int \| str \| None"), (Literal["a", "b"], "a", r"typing\.Literal\['a', 'b'\]"),
    (Colour, Colour.RED, "Colour")])
def test_an_option_of_another_type_is_refused_and_named(kind, default, said):
    cls = make_dataclass("Palette", [("tint", kind, option(default, "a tint"))], bases=(Options,), frozen=True)
    for read in (cls, lambda: parse_options([], cls), lambda: fill({"tint": "a"}, [cls], None, "here")):
        with pytest.raises(UserError, match=rf"^Palette\.tint: an option of the type {said}, must be bool, int, float "
                           r"or str, or one of them \| None; a list is comma-separated text$"):
            read()


def test_an_option_without_a_default_is_refused_and_named():
    for known in ((), (dataclasses.field(default_factory=str),)):
        cls = make_dataclass("Palette", [("tint", str, *known)], bases=(Options,), frozen=True)
        with pytest.raises(UserError, match=r"^Palette\.tint: an option without a default, must be option\("):
            parse_options([], cls)


def test_help_shows_every_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--help"], Network, Process, description="What it does.")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text and "--config FILE" in text
    for shown in ("--width INT channels, 100 % of them (default: 64)", "mean or max (default: mean)",
                  "takes labels (default: False)", "step to stop at (default: unset)", "steps (default: 1000)"):
        assert shown in text


def test_nearest():
    assert nearest("num_chanels", ["num_channels", "seed"]) == " (did you mean num_channels?)"
    assert nearest("xyz", ["num_channels", "seed"]) == ""


# YAML files and precedence


def test_the_old_name_of_an_option_is_taken(config, capsys):
    path = config("tint: red\n")
    assert network("--tint", "red").colour == network("--config", path).colour == "red"
    for name in ("--colour", "--tint"):
        assert network("--config", path, name, "blue").colour == "blue"
    assert refusal("--tint") == "--tint: a value is missing"
    both = config("tint: red\ncolour: blue\n")
    assert refusal("--config", both) == f"tint in {both}: is the former name of colour, which is given too, give one"
    with pytest.raises(SystemExit):
        network("--help")
    assert "--colour STR" in (text := capsys.readouterr().out) and "--tint" not in text


def test_a_yaml_file_gives_values_of_any_spelling(config):
    path = config('width: "32"\nrate: 1e-4\nclass_cond: "True"\nlevels: 8\nstop:\n')
    assert network("--config", path) == Network(width=32, rate=1e-4, class_cond=True, levels="8", stop=None)


@pytest.mark.parametrize(("text", "value"), [("~/a", "/home/me/a"), ("~", "~"), ("~a/b", "~a/b"), ("a/~/b", "a/~/b")])
def test_the_home_folder_is_what_it_is_to_a_shell(text, value, config, monkeypatch):
    """In a YAML file, and after `=` on a command line, no shell replaces it: images would go to a folder named ~."""
    monkeypatch.setenv("HOME", "/home/me")
    assert network("--config", config(f'colour: "{text}"\n')).colour == network(f"--colour={text}").colour == value


def test_the_command_line_goes_before_the_file_before_the_preset_before_the_default(config):
    path = config("width: 32\ndropout: 0.5\n")

    def preset(given):
        assert given == {"width": 16, "dropout": 0.5}
        return {"width": 128, "dropout": 0.25, "pool": "max"}

    got = network("--config", path, "--width", "16", preset=preset)
    assert got == Network(width=16, dropout=0.5, pool="max")


def test_an_unknown_key_is_told_the_nearest_name_and_the_file(config):
    path = config("widht: 3\n")
    assert refusal("--config", path) == f"widht in {path}: no such option (did you mean width?)"
    assert "no such option" in refusal("--config", config("3: 3\n"))
    assert "no such option" in refusal("--config", config("config: other.yaml\n"))


def test_a_wrong_value_in_a_file_is_refused_as_on_the_command_line(config):
    assert refusal("--config", config("width: 0\n")) == "--width 0: must be at least 1"
    assert refusal("--config", config("width: true\n")) == "--width True: must be a whole number"
    assert refusal("--config", config("levels: [1, 2]\n")) == "--levels [1, 2]: must be text"
    assert refusal("--config", config("levels:\n")) == "--levels None: must be text"
    assert refusal("--config", config("dropout: .nan\n")) == "--dropout nan: must be a number"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- width\n- 3\n", "width\n"],
                         ids=["empty", "comment", "list", "word"])
def test_a_file_that_holds_no_names_and_values_is_refused(config, text):
    path = config(text)
    assert refusal("--config", path) == f"--config {path}: must hold option names and values, one a line"


def test_a_missing_file_is_refused(tmp_path):
    path = tmp_path / "missing.yaml"
    with pytest.raises(UserError, match=r"missing\.yaml: cannot be read"):
        read_yaml(path)
    assert "cannot be read" in refusal("--config", str(tmp_path))


# Every option of the package


def options_classes():
    for module in pkgutil.walk_packages(guided_diffusion.__path__, "guided_diffusion."):
        importlib.import_module(module.name)

    def below(cls):
        return [cls, *(found for child in cls.__subclasses__() for found in below(child))]
    return [cls for cls in below(Options) if cls.__module__.startswith("guided_diffusion.") and cls is not Options]


def test_every_option_of_the_package_says_what_it_is_and_its_default():
    classes = options_classes()
    assert {"ModelOptions", "UpsamplerOptions", "DiffusionOptions", "ClassifierOptions", "SagOptions", "SampleOptions",
            "TrainOptions", "ClassifierTrainOptions"} <= {cls.__name__ for cls in classes}
    for cls in classes:
        assert cls.__doc__
        for field in option_fields(cls):
            help, _, default = field.help.rpartition(" (default: ")
            assert len(help) >= 5, f"{cls.__name__}.{field.name} has no help"
            assert default == ("unset)" if field.default in (None, "") else f"{field.default})")
        cls()      # the defaults lie in their own ranges
