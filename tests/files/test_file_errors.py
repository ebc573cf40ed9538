"""Whose fault an error of reading a file is."""

import errno
import os
import zipfile

import pytest
import torch
from image_folders import save_vae
from released import fixture, tiny_model, under
from safetensors import SafetensorError
from safetensors.torch import load_file

import edt
from edt.data.extraction import ExtractOptions, open_source
from edt.data.vae import load_autoencoder
from edt.files.errors import named_errors
from edt.sampling.conversion import ConvertOptions, convert, read_released_file
from edt.sampling.pipeline import load_pipeline


def fail(error, *before):
    """Raises the error; `before`, while earlier ones are handled."""
    if before:
        try:
            fail(*before)
        except Exception:
            raise error  # noqa: B904, as libraries do
    raise error


OF_MACHINE = [
    (MemoryError(), MemoryError, "out of memory"),
    (MemoryError("8 GiB"), MemoryError, "8 GiB"),
    (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "CUDA out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError, "Def.*can't allocate memory"),
    (RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)"), MemoryError, "unable to mmap"),
    (OSError(errno.EIO, os.strerror(errno.EIO)), OSError, "Input/output error"),
    (SafetensorError("Input/output error (os error 5)"), OSError, "Input/output error"),
    (OSError("No such device (os error 19)"), OSError, "No such device"),
]


@pytest.mark.parametrize(("error", "kind", "said"), OF_MACHINE, ids=repr)
def test_what_no_file_is_to_blame_for(error, kind, said):
    with pytest.raises(kind, match=rf"file x cannot be read: {said}") as caught, named_errors("file x", "is torn"):
        raise error
    assert caught.value.__cause__ is error
    if kind is OSError:
        assert caught.value.errno in (errno.EIO, errno.ENODEV)


@pytest.mark.parametrize("error", [each for each, *_ in OF_MACHINE if getattr(each, "errno", None) is None])
def test_what_a_library_hides(error):
    """diffusers, of any error: it looks into the file, which is no text, and says that it cannot load it."""
    hidden = UnicodeDecodeError("utf-8", b"", 0, 1, "")
    kinds = MemoryError, OSError, torch.OutOfMemoryError
    with pytest.raises(kinds, match=r"^(\[Errno \d+\] )?file x cannot be read: "), named_errors("file x"):
        fail(OSError("Unable to load weights"), hidden, error)


def test_a_missing_file_keeps_its_name(tmp_path):
    said = r"folder x cannot be read: .*nowhere\.txt"
    with pytest.raises(FileNotFoundError, match=said), named_errors("folder x"):
        (tmp_path / "nowhere.txt").read_bytes()


def test_a_missing_file_of_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^run x cannot be read: .*nowhere"), named_errors("run x"):
        load_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("arr"), r"KeyError\('arr'\)"),
        (zipfile.BadZipFile(), r"BadZipFile\(\)"),
        (ValueError("is short"), "is short"),
        (EOFError(), r"EOFError\(\)"),
        (RuntimeError("not a number"), "not a number"),
        (OSError("cannot identify image"), "cannot identify image"),
    ],
)
def test_what_a_file_is_to_blame_for(error, said):
    with pytest.raises(ValueError, match=f"^file x is torn: {said}$"), named_errors("file x", "is torn"):
        raise error


def test_what_is_named_already_is_not_named_twice():
    with pytest.raises(ValueError, match=r"^file x has objects$"), named_errors("file x", "is torn"):
        raise ValueError("file x has objects")


def weights(folder):
    tiny_model().save_pretrained(folder)
    return edt.load_checkpoint, "safetensors.torch.load_file"


def vae(folder):
    save_vae(folder)
    return load_autoencoder, "safetensors.torch.load_file"


def pipeline(folder):
    edt.EDTPipeline(tiny_model(), edt.make_scheduler()).save_pretrained(folder)
    return load_pipeline, "edt.sampling.pipeline.EDTPipeline.from_pretrained"


def released(folder):
    torch.save(tiny_model().state_dict(), folder)
    return read_released_file, "torch.load"


def released_shapes(folder):
    torch.save(under("param", fixture("edt_tiny_s")), folder)
    options = ConvertOptions(folder, folder.with_name("output"))
    return lambda _: convert(options), "edt.sampling.conversion.load_released_state_dict"


def table(folder):
    import datasets

    datasets.Dataset.from_dict({"image": [None], "label": [0]}).save_to_disk(folder)
    return (
        lambda folder: open_source(ExtractOptions(folder, folder.with_name("output")))
    ), "datasets.load_from_disk"


def column(folder):
    return table(folder)[0], "datasets.Dataset.cast_column"


@pytest.mark.parametrize("kind", [weights, vae, pipeline, released, released_shapes, table, column])
def test_readers_do_not_blame_the_file_for_a_lack_of_memory(tmp_path, monkeypatch, kind):
    read, reader = kind(tmp_path / "file")
    monkeypatch.setattr(reader, lambda *args, **kwargs: fail(RuntimeError("can't allocate memory")))
    with pytest.raises(MemoryError, match=r".* cannot be read: .*can't allocate memory"):
        read(str(tmp_path / "file") if kind is vae else tmp_path / "file")
