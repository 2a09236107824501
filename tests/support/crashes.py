"""What kills leave of a command: the states of its folder between all its changes, seen in a run that nobody kills."""

import contextlib
import csv
import io
import json
import os
import shutil

import numpy as np
import pytest

CHANGES = ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir")      # of os, which all others call
TIMES = ("began", "written", "started", "process", "seconds", "timing", "images_per_second")


def content_of(folder):
    """What lies in a folder: the bytes of each file by its name, None for each folder."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
            for path in sorted(folder.rglob("*"))}


def restore(folder, content):
    """Makes a folder hold this content, and nothing else."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in content.items():
        path = folder / name
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)


@contextlib.contextmanager
def states_of(folder):
    """Within, fills the list that it gives with the content of a folder before each change of what files there are.

    A file that is being written then lies there under its temporary name.
    """
    states = []

    def before(change):
        def changed(*words, **more):
            state = content_of(folder)
            if not states or state != states[-1]:
                states.append(state)
            return change(*words, **more)
        return changed

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, before(getattr(os, name)))
        yield states


def says_finished(content):
    """Whether a state of a job in this content says that the job has done all."""
    states = [json.loads(data)["state"] for name, data in content.items() if name.endswith("status.json")]
    return "finished" in states


def timeless(content):
    """The content of a folder without the times, which differ: in JSON, in chunks and in logs of trainings."""
    return {name: _without_times(name, data) for name, data in content.items()}


def _without_times(name, data):
    if name.endswith(".json"):
        return _pruned(json.loads(data))
    if name.endswith("progress.csv"):
        return [_pruned(row) for row in csv.DictReader(io.StringIO(data.decode()))]
    if name.endswith(".npz"):
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            if "seconds" in file:                   # of a chunk
                return {name: array.tobytes() for name, array in file.items() if name != "seconds"}
    return data


def _pruned(value):
    if isinstance(value, dict):
        return {key: _pruned(one) for key, one in value.items() if key not in TIMES}
    return [_pruned(one) for one in value] if isinstance(value, list) else value
