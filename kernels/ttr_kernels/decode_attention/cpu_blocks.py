"""What decoding attention does innermost, in LLVM vectors: LANES keys or values of one head at a time.

Keys and values of a position lie in one row, head by head. While a block is worked on, the same head of the next one is
fetched: reading and computing overlap, which a processor does not see to by itself where rows of other heads lie
between.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..common.storage import element_pointer
from ..common.tile_multiply import LANES, accumulated
from ..common.vectors import fetch_later, lane_sums, load_vector, spread

_WORD, _FLOAT = ir.IntType(64), ir.FloatType()
# Values that are summed beside each other, so that no addition waits for the one before.
_TERMS = 4


def _vector_at(builder: Any, pointer: Any) -> Any:
    return builder.bitcast(pointer, ir.VectorType(_FLOAT, LANES).as_pointer())


def _row_of_elements(builder: Any, address: Any, kind: Any, context: Any) -> Any:
    return builder.inttoptr(address, context.get_data_type(kind).as_pointer())


@intrinsic
def block_logits(
    context: Any, logits: Any, logits_at: Any, keys: Any, keys_at: Any, stride: Any, query: Any, query_at: Any,
    dim: Any, ahead: Any,
) -> Any:  # fmt: skip
    """logits[logits_at + j] = Σ_d query[query_at + d] · keys[keys_at + j·stride + d] for j < LANES, d < dim.

    dim is a multiple of LANES. `ahead` is the address of the element that corresponds to keys_at in the next block.
    """
    index = types.intp
    signature = types.void(logits, index, keys, index, index, query, index, index, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        logits, logits_at, keys, keys_at, stride, query, query_at, dim, ahead = arguments
        of_logits, of_keys, of_query = (signature.args[i] for i in (0, 2, 5))
        start = element_pointer(context, builder, of_keys, keys, keys_at)
        next_start = _row_of_elements(builder, ahead, of_keys.dtype, context)
        query_start = element_pointer(context, builder, of_query, query, query_at)
        offsets = [builder.mul(stride, _WORD(j)) for j in range(LANES)]

        def factors(d: Any) -> Any:
            of_query = [load_vector(builder, builder.gep(query_start, [d]), types.float32)]

            def row(j: int) -> Any:
                at = builder.add(d, offsets[j])
                fetch_later(builder, builder.gep(next_start, [at]))
                return [load_vector(builder, builder.gep(start, [at]), of_keys.dtype)]

            return row, of_query

        sums = accumulated(builder, dim, LANES, LANES, 1, factors)
        target = element_pointer(context, builder, of_logits, logits, logits_at)
        builder.store(lane_sums(builder, [total for (total,) in sums]), _vector_at(builder, target), align=4)
        return context.get_dummy_value()

    return signature, generate


def _weighted_sum(vectors: int) -> Any:
    def typing(
        context: Any, result: Any, result_at: Any, weights: Any, weights_at: Any, values: Any, values_at: Any,
        stride: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(result, index, weights, index, values, index, index, index)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            result, result_at, weights, weights_at, values, values_at, stride, ahead = arguments
            of_result, of_weights, of_values = (signature.args[i] for i in (0, 2, 4))
            start = element_pointer(context, builder, of_values, values, values_at)
            next_start = _row_of_elements(builder, ahead, of_values.dtype, context)
            weights_start = element_pointer(context, builder, of_weights, weights, weights_at)

            def factors(j: Any) -> Any:
                row, of_weights = [], []
                for term in range(_TERMS):
                    position = builder.add(j, _WORD(term))
                    weight = builder.load(builder.gep(weights_start, [position]), align=4)
                    of_weights += [spread(builder, weight)] * vectors
                    for vector in range(vectors):
                        at = builder.add(builder.mul(position, stride), _WORD(vector * LANES))
                        fetch_later(builder, builder.gep(next_start, [at]))
                        row.append(load_vector(builder, builder.gep(start, [at]), of_values.dtype))
                return lambda r: row, of_weights

            (sums,) = accumulated(builder, _WORD(LANES), _TERMS, 1, _TERMS * vectors, factors)
            for vector in range(vectors):
                first, second, third, fourth = sums[vector::vectors]
                total = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
                at = builder.add(result_at, _WORD(vector * LANES))
                pointer = _vector_at(builder, element_pointer(context, builder, of_result, result, at))
                builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
            return context.get_dummy_value()

        return signature, generate

    return typing


# result[result_at + d] += Σ_j weights[weights_at + j] · values[values_at + j·stride + d] for j < LANES, of LANES or
# twice as many elements d; `ahead` as above.
add_block_of_values = intrinsic(_weighted_sum(1))
add_wide_block_of_values = intrinsic(_weighted_sum(2))
