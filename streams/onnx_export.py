"""A published pre-ranker as an ONNX graph, for those who serve it elsewhere.

Inputs, with dynamic axes ``n`` (candidates), ``h`` (history) and ``k`` (anchors):

==================  ===========  ========================================================================
``user_row``        int64 []     row of the user, 0 for one that the ids table does not name
``history_row``     int64 [h]    rows of what the user liked; items that the ids table does not name are left out
``item_row``        int64 [n]    rows of the candidates, 0 for items that the ids table does not name
``content``         float [n,d]  the candidates' vectors in the frozen space, unit length
``anchors``         float [k,d]  the user's anchors, unit length; k = 0 for a user without
``anchor_logprob``  float [k]    natural log of each anchor's probability; with kernel matching only
==================  ===========  ========================================================================

Output ``score`` float [n]: the logits that ``PreRanker.score`` gives, to 1e-5. The ids table is JSON,
``{"model": ..., "users": [...], "items": [...]}``, the first id of each list has row 1. What the graph was made from
stands in its metadata; the ``version`` there is the table's ``model``, or the two are not of one export. The formulas
are those of ``gpl.preranker.model`` and ``gpl.labels.matching``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from gpl.labels import labeller
from gpl.labels.labeller import PreparedAnchors
from gpl.preranker.model import PreRanker
from streams.durable import replacing
from streams.models import ModelError, Published

OPSET = 18
TOLERANCE = 1e-5
_CHECKED = 64
"""Made-up candidates on which a graph is compared with the network."""


def export(published: Published, matching: labeller.Config, target: Path) -> Path:
    """Write the graph to ``target`` and the ids table beside it (``.ids.json``); returns the table's path.

    ``matching``: how anchor scores are made (settings ``labels.matching``, ``labels.kernel_tau``). Before it
    is written the graph is run under onnxruntime and compared with the network: ModelError when they differ by more
    than 1e-5 of the largest score or of 1.
    """
    graph: bytes = _graph(published, matching).SerializeToString()
    _check(published, matching, graph)
    target.parent.mkdir(parents=True, exist_ok=True)
    ids = target.with_suffix(".ids.json")
    document = {
        "model": published.manifest.version,
        "users": published.ids.users,
        "items": published.ids.items,
    }
    # Both are whole before either takes its place, the table first: only a kill in between leaves two of two exports.
    with replacing(target) as graph_file, replacing(ids) as ids_file:
        graph_file.write(graph)
        ids_file.write(msgspec.json.encode(document))
    return ids


def _graph(published: Published, matching: labeller.Config) -> Any:
    from onnx import TensorProto, checker, helper, numpy_helper

    weights = {name: tensor.numpy() for name, tensor in published.weights.items()}
    manifest = published.manifest
    dim = weights["content"].shape[1]
    constants: dict[str, NDArray[Any]] = {
        "users": weights["users"] + weights["default"],
        "items": weights["items"],
        "history": weights["history"],
        "unknown": np.array([0], np.int64),
        "at_least_one": np.array(1, np.int64),
        "rows": np.array([0], np.int64),
        "item_bias": weights["item_bias"][:, 0],
        "content_to_tower": weights["content"].T.copy(),
        "anchor_axis": np.array([1], np.int64),
        "zero": np.array(0, np.int64),
        "below_any_cosine": np.array(-3, np.float32),
        "one": np.array(1, np.float32),
        "minus_one": np.array(-1, np.float32),
        "column": np.array([-1, 1], np.int64),
        **_cross_constants(published, matching),
    }
    inputs = [
        helper.make_tensor_value_info("user_row", TensorProto.INT64, []),
        helper.make_tensor_value_info("history_row", TensorProto.INT64, ["h"]),
        helper.make_tensor_value_info("item_row", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("content", TensorProto.FLOAT, ["n", dim]),
        helper.make_tensor_value_info("anchors", TensorProto.FLOAT, ["k", dim]),
    ]
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Gather", ["users", "user_row"], "own", {}),
        # The row of unknown ids is zero: with it the sum is defined for no history too.
        ("Concat", ["unknown", "history_row"], "unknown_and_history", {"axis": 0}),
        ("Gather", ["history", "unknown_and_history"], "of_history", {}),
        ("ReduceSum", ["of_history", "rows"], "sum_of_history", {"keepdims": 0}),
        ("Size", ["history_row"], "history_size", {}),
        ("Max", ["history_size", "at_least_one"], "some_size", {}),
        ("Cast", ["some_size"], "size", {"to": TensorProto.FLOAT}),
        ("Sqrt", ["size"], "root_of_size", {}),
        ("Div", ["sum_of_history", "root_of_size"], "liked", {}),
        ("Add", ["own", "liked"], "user", {}),
        ("MatMul", ["content", "content_to_tower"], "from_content", {}),
        ("Gather", ["items", "item_row"], "from_id", {}),
        ("Add", ["from_content", "from_id"], "item", {}),
        ("MatMul", ["item", "user"], "product", {}),
        ("Gather", ["item_bias", "item_row"], "bias_of_item", {}),
        ("Add", ["product", "bias_of_item"], "biased", {}),
        ("Add", ["biased", "bias"], "tower", {}),
        ("Transpose", ["anchors"], "anchor_columns", {"perm": [1, 0]}),
        ("MatMul", ["content", "anchor_columns"], "raw_cosine", {}),
        ("Clip", ["raw_cosine", "minus_one", "one"], "cosine", {}),
        ("Shape", ["anchors"], "anchors_shape", {}),
        ("Gather", ["anchors_shape", "zero"], "anchor_count", {}),
        ("Equal", ["anchor_count", "zero"], "no_anchors", {}),
    ]
    if matching.matching == "max":
        steps += [
            # With a column that no cosine reaches, the maximum is defined for no anchors too.
            ("Mul", ["bias_of_item", "no_weight"], "zeros", {}),
            ("Add", ["zeros", "below_any_cosine"], "floor", {}),
            ("Reshape", ["floor", "column"], "floor_column", {}),
            ("Concat", ["cosine", "floor_column"], "cosine_or_floor", {"axis": 1}),
            ("ReduceMax", ["cosine_or_floor", "anchor_axis"], "anchor_score", {"keepdims": 0}),
        ]
    else:
        inputs.append(helper.make_tensor_value_info("anchor_logprob", TensorProto.FLOAT, ["k"]))
        steps += [
            ("Softmax", ["anchor_logprob"], "probability", {"axis": -1}),
            ("Sub", ["cosine", "one"], "below_one", {}),
            ("Div", ["below_one", "tau"], "scaled", {}),
            ("Exp", ["scaled"], "kernel", {}),
            ("MatMul", ["kernel", "probability"], "kernel_sum", {}),
            ("Min", ["kernel_sum", "one"], "anchor_score", {}),
        ]
    steps += [
        ("Mul", ["anchor_score", "slope"], "scaled_score", {}),
        ("Add", ["scaled_score", "offset"], "cross", {}),
        ("Where", ["no_anchors", "w_missing", "cross"], "cross_or_missing", {}),
        ("Add", ["tower", "cross_or_missing"], "score", {}),
    ]
    used = {name for _, arguments, _, _ in steps for name in arguments}
    graph = helper.make_graph(
        [helper.make_node(kind, arguments, [out], **how) for kind, arguments, out, how in steps],
        "preranker",
        inputs,
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])],
        # Of one that no step takes onnxruntime warns whenever the graph is loaded.
        [
            numpy_helper.from_array(np.ascontiguousarray(value), name)
            for name, value in constants.items()
            if name in used
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="gpl-streams"
    )
    helper.set_model_props(
        model,
        {
            "version": manifest.version,
            "encoder": manifest.encoder,
            "quantiser": manifest.quantiser,
            "matching": matching.matching,
        },
    )
    checker.check_model(model, full_check=True)
    return model


def _cross_constants(published: Published, matching: labeller.Config) -> dict[str, NDArray[Any]]:
    # The cross input is linear in the anchor score, so two of its values say all.
    zeros = np.zeros(3, np.float32)
    missing, at_zero, at_one = _network(published).combine(zeros, np.array([np.nan, 0.0, 1.0], np.float32)).tolist()
    bias = float(published.weights["bias"])
    return {
        "bias": np.array(bias, np.float32),
        "slope": np.array(at_one - at_zero, np.float32),
        "offset": np.array(at_zero - bias, np.float32),
        "w_missing": np.array(missing - bias, np.float32),
        "tau": np.array(matching.kernel_tau, np.float32),
        "no_weight": np.array(0, np.float32),
    }


def _network(published: Published) -> PreRanker:
    return PreRanker.of_state(published.weights, int(published.manifest.config["dim_content"]))


def _check(published: Published, matching: labeller.Config, graph: bytes) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    network, rng = _network(published), np.random.default_rng(0)
    item_row = rng.integers(network.n_items, size=_CHECKED)
    content = rng.normal(size=(_CHECKED, network.dim_content)).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    logprob = np.log(np.array([0.5, 0.2, 0.1], np.float32))
    liked = rng.integers(1, network.n_items, size=5) if network.n_items > 1 else np.zeros(0, np.int64)
    for user_row, k in ((0, 0), (0, 3), (network.n_users - 1, 0), (network.n_users - 1, 3)):
        history = liked if k else liked[:0]
        cross = None
        if k:
            prepared = PreparedAnchors.build(content[:k], logprob, np.ones(k, np.float32), 1, matching)
            cross = labeller.score(prepared, content)[0]
        expected = network.score(user_row, item_row, content, cross, history)
        fed: dict[str, NDArray[Any]] = {
            "user_row": np.array(user_row, np.int64),
            "history_row": history,
            "item_row": item_row,
            "content": content,
            "anchors": content[:k],
        }
        if matching.matching == "kernel":
            fed["anchor_logprob"] = logprob[:k]
        found = session.run(["score"], fed)[0]
        off = float(np.abs(found - expected).max())
        if not off <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise ModelError(f"{published.manifest.version}: scores of the graph are off by {off:g}, k = {k}")
