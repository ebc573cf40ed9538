"""The ops inside diffusers' transformers: DiT, PixArt, Stable Diffusion 3 and 3.5, Flux.

```python
from edt_kernels.integrations.diffusers import apply_amm, fuse_adaln

apply_amm(transformer, "dit-xl")  # attention modulated by token distance, in the published blocks
fuse_adaln(transformer)  # LayerNorm, modulation, gate and residual by fused kernels
```

Both change a model in place, work together in either order, leave parameters and state dict as they are, and are
undone by `remove_amm` and `unfuse_adaln`. Written for the blocks and processors of diffusers 0.42. Tested on CPUs,
on the reference path and on the interpreted kernels; nothing here has run on a GPU.
"""

try:
    import diffusers as _diffusers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ImportError(
        "edt_kernels.integrations.diffusers needs the package diffusers, which is not installed: "
        "pip install 'diffusers>=0.42'"
    ) from error

from .adaln import fuse_adaln, unfuse_adaln
from .amm import apply_amm, remove_amm

__all__ = ["apply_amm", "fuse_adaln", "remove_amm", "unfuse_adaln"]
