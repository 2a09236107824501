"""The published table of perturbed attention."""

from evaluations.reproduction.tables import load_table
from evaluations.reproduction.verdicts import not_comparable


def test_perturbed_attention_of_the_released_checkpoints():
    rows = load_table("pag_imagenet256").rows
    assert {name: dict(row.published) for name, row in rows.items()} == {
        "uncond": {"fid": 26.21}, "uncond_pag": {"fid": 16.23}, "cond": {"fid": 10.94}, "cond_pag": {"fid": 6.32}}
    for name, row in rows.items():
        model = "256x256_diffusion" + "_uncond" * name.startswith("uncond")
        assert row.run.sample.model_path == f"models/{model}.pt" and row.run.sample.sampler_name == "ddpm"
        assert row.run.model.class_cond == (not name.startswith("uncond")) and row.run.model.use_fp16
        assert (row.images, row.run.num_steps) == (50_000, 250)
        assert [method.headline() for method in row.run.active] == ["PAG s = 1"] * name.endswith("_pag")
        assert row.evaluation.reference == "VIRTUAL_imagenet256_labeled.npz"
        assert not_comparable(row, 50_000, []) == []
