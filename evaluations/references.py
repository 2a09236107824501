"""The official reference batches of guided-diffusion, by name: which there are, fetching them, and finding one.

Each holds images, for precision and recall, and the statistics of a larger set, for FID and sFID.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion.cli import run_renamed
from guided_diffusion.errors import UserError
from guided_diffusion.fetch import Download, sha256_of, size_of
from guided_diffusion.files import check_folder
from guided_diffusion.foreign import reading
from guided_diffusion.npz import BatchFile
from guided_diffusion.options import Options, nearest, option, switch

from .image_sets import open_images

MODELS = Path(__file__).parent / "models"
URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
FOLDERS = {
    "VIRTUAL_imagenet64_labeled": "imagenet/64",
    "VIRTUAL_imagenet128_labeled": "imagenet/128",
    "VIRTUAL_imagenet256_labeled": "imagenet/256",
    "VIRTUAL_imagenet512": "imagenet/512",
    "VIRTUAL_lsun_bedroom256": "lsun/bedroom",
    "VIRTUAL_lsun_cat256": "lsun/cat",
    "VIRTUAL_lsun_horse256": "lsun/horse",
}


def reference_names() -> list[str]:
    """The names of the official reference batches."""
    return list(FOLDERS)


def reference_url(name: str) -> str:
    """The address of the reference batch of that name; raises UserError for an unknown name."""
    if name not in FOLDERS:
        raise UserError(f"{name}: is no reference batch{nearest(name, FOLDERS)}, there are {', '.join(FOLDERS)}")
    return f"{URL}{FOLDERS[name]}/{name}.npz"


def fetch_reference(name: str, folder: str | Path) -> Path:
    """Fetches a reference batch to `folder`, as NAME.npz, unless it is there, and returns its path.

    Progress is shown on stderr. Raises UserError for an unknown name, where the download fails, or where another file
    has this name.
    """
    return Download(reference_url(name), Path(folder) / f"{name}.npz", check=_misfit).run()


def _misfit(path: Path) -> str | None:
    """Says why a file is no reference batch, in words that follow its name; None where it is one."""
    try:
        if BatchFile(path).statistics() is None:
            return "is no reference batch, it has no mu and sigma"
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def bundled_reference(name: str) -> Path:
    """Returns where the bundled reference batch of that name is, if there is one."""
    return MODELS / f"{name}_reference.npz"


def open_reference(word: str) -> BatchFile:
    """Opens the reference batch at that path, or the bundled one of that name.

    Images without statistics do as well, in all forms that `open_images` takes. Raises UserError as that.
    """
    bundled = bundled_reference(word)
    with reading(word, "cannot be read"):
        is_there = Path(word).exists()
    if not is_there and bundled.is_file():
        return BatchFile(bundled)
    if not is_there and not Path(word).suffix:
        known = sorted(path.name.removesuffix("_reference.npz") for path in MODELS.glob("*_reference.npz"))
        raise UserError(f"{word}: there is no such file, and no bundled reference of that name{nearest(word, known)}, "
                        f"there are {', '.join(known)}")
    return open_images(word)


def find_reference(word: str, folder: str | Path) -> Path | None:
    """The file that `word` names: a path, one in `folder`, or a bundled reference batch; None where there is none."""
    candidates = [Path(word), Path(folder) / word, bundled_reference(word)] if word else []
    return next((path for path in candidates if path.is_file()), None)


def _description(name: str, ask: bool) -> str:
    """Describes a reference batch before it is fetched, in lines; ask: also ask the server for its size."""
    url = reference_url(name)
    size = size_of(url) if ask else None
    return f"{name}\n    address: {url}" + (f"\n    size:    {size:,} bytes" if size else "")


@dataclass(frozen=True)
class ReferencesOptions(Options):
    """The reference batches."""

    list: bool = switch("say what there is and fetch nothing")
    out: str = option("references", "folder for the files")


def fetch_references(names: Sequence[str], options: ReferencesOptions) -> Iterator[str]:
    """Fetches the reference batches of these names, and yields what to say of each, before and after.

    Raises UserError, before a server is asked, for no name, for an unknown one, and where --out cannot be written.
    """
    names = list(dict.fromkeys(names)) or (reference_names() if options.list else [])
    if not names:
        raise UserError(f"no NAME is given: name a reference batch, there are {', '.join(FOLDERS)}")
    for name in names:
        reference_url(name)
    if not options.list:
        check_folder("--out", options.out)
    for name in names:
        yield _description(name, ask=not options.list)
    for name in names if not options.list else []:
        done = "is there already" if (Path(options.out) / f"{name}.npz").exists() else "fetched"
        path = fetch_reference(name, options.out)
        yield f"{path}: {done}, {path.stat().st_size:,} bytes, SHA-256 {sha256_of(path)}"


if __name__ == "__main__":
    run_renamed("python -m evaluations.references", "fetch_references")
