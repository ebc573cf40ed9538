"""Which package this is, and the other one that is imported as `edt`."""

__version__ = "0.1.0"


def other_edt() -> str | None:
    """What to do about PyPI's `edt`, a distance transform, where it is installed too; None where it is not."""
    from importlib.metadata import PackageNotFoundError, version  # takes as long as all else of `import edt`

    try:
        found = version("edt")
    except PackageNotFoundError:
        return None
    return (
        f"edt {found}, a distance transform, is installed beside edt-kernels; both are imported as edt, so that "
        "one hides the other: keep them in environments of their own, or pip uninstall edt"
    )
