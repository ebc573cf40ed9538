"""Folders of pipelines that were saved by version 0.1 name this module for `trust_remote_code`."""

from .sampling import EDTPipeline

__all__ = ["EDTPipeline"]
