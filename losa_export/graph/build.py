"""The builder that knows a decoder's family."""

from __future__ import annotations

import onnx_ir as ir

from losa_export.architecture import DecoderSpec
from losa_export.graph.decoder import DecoderBuilder
from losa_export.graph.opt import OptBuilder
from losa_export.graph.profiles import ProfileName, make_profile
from losa_export.graph.weights import WeightStore


def build_decoder(spec: DecoderSpec, store: WeightStore, profile_name: ProfileName, producer: str) -> ir.Model:
    """Build the whole model; its weights are written on the way.

    Args:
        spec: the architecture.
        store: reads the checkpoint and writes external data.
        profile_name: the dialect.
        producer: version of this program, recorded in the model.

    Returns: a model whose large initializers refer to the data file that `store` writes.
    """
    profile = make_profile(profile_name, spec)
    builder = DecoderBuilder(spec, store, profile) if spec.opt is None else OptBuilder(spec, spec.opt, store, profile)
    return builder.build(profile_name, producer)
