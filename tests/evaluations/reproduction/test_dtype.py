"""A table computes in the type of its rows, or in one type for all of them."""

from commands import flags

from evaluations.reproduction import reproduce
from evaluations.reproduction.reproduce import ReproduceOptions, choose, decided, unlike_file
from evaluations.reproduction.tables import load_table
from guided_diffusion.execution import Choice
from guided_diffusion.options import parse_options
from guided_diffusion.runs import sample


def chosen(out, **options):
    table, _ = choose(["scenes32"], parse_options(flags({"out": out, **options}), ReproduceOptions)[0])
    return table


def types(table):
    return {row.run.configuration()["dtype"] for row in table.rows.values()}


def test_the_small_tables_compute_in_what_no_machine_is_slow_in(tmp_path):
    assert all(types(load_table(name)) == {"float32"} for name in ("fmnist32", "scenes32", "scenes32_dag"))
    assert types(chosen(tmp_path, dtype="bfloat16")) == {"bfloat16"}


def test_auto_is_found_once_for_all_rows_and_kept(tmp_path, monkeypatch):
    timings = []

    def choice(*settings):
        timings.append(settings)
        return Choice("bfloat16", {"float32": 2.0, "bfloat16": 1.0}, 1)
    monkeypatch.setattr(sample, "choose_dtype", choice)
    table = chosen(tmp_path, dtype="auto")
    assert types(decided(table)) == {"bfloat16"} and len(timings) == 1
    assert decided(chosen(tmp_path)).rows == chosen(tmp_path).rows and len(timings) == 1
    begun = table.rows["sag_1"].run.out
    for module in (reproduce, sample):
        monkeypatch.setattr(module, "recorded_dtype", lambda folder: "float16" if folder == begun else None)
    assert types(decided(table)) == {"float16"} and len(timings) == 1


def test_numbers_of_another_type_than_the_published_ones_are_not_comparable(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "choose_dtype", lambda *_: Choice("bfloat16", {"float32": 2.0, "bfloat16": 1.0}, 1))
    for asked, expected in (("", []), ("float16", []), ("bfloat16", ["computed in bfloat16, published with float16"]),
                            ("float32", ["computed in float32, published with float16"]),
                            ("auto", ["computed in bfloat16, published with float16"])):
        options, = parse_options(flags({"out": tmp_path, "rows": "imagenet256", "dtype": asked}), ReproduceOptions)
        table, in_files = choose(["sag_pretrained_256"], options)
        row = decided(table).rows["imagenet256"]
        assert unlike_file(row, in_files.rows["imagenet256"]) == expected
