"""How the conformance command measures a gradient, and how it says what was on a link."""

import numpy as np

from control.conformance.parent import _words
from control.conformance.script import BFLOAT16_ELEMENT_TOLERANCE, BFLOAT16_NORM_TOLERANCE, deviation
from spheres.v1 import work_pb2 as pb

#: one number of bfloat16 beyond 1.0
_NEXT = np.float32(1 + 2.0**-7)


def rounded(*indexes):
    """A gradient in which these elements were rounded the other way; the first one is most of its norm."""
    array = np.full(1000, 2.0**-8, np.float32)
    array[:2] = 1
    array[list(indexes)] *= _NEXT
    return array


def test_a_large_element_that_was_rounded_the_other_way_is_no_fault():
    plain = deviation(rounded(0), rounded())
    assert plain.norm > BFLOAT16_NORM_TOLERANCE  # why it is left aside
    off = deviation(rounded(0), rounded(), aside=1)
    assert off.norm == 0
    assert 0 < off.element <= BFLOAT16_ELEMENT_TOLERANCE


def test_more_of_them_are_one():
    assert deviation(rounded(0, 1), rounded(), aside=1).norm > BFLOAT16_NORM_TOLERANCE


def test_an_element_beyond_rounding_is_one_whatever_is_left_aside():
    found = rounded()
    found[0] = 1.05
    assert deviation(found, rounded(), aside=1).element > BFLOAT16_ELEMENT_TOLERANCE


def test_digests_are_in_hexadecimal_as_in_docs_and_logs():
    header = pb.WeightsHeader(manifest_digest=bytes(range(16)), from_chunk=3)
    message = pb.WorkResponse(tag=pb.Tag(term=1, step=2, weights_version=2), weights_header=header)
    said = _words(message)
    assert said == (
        "[term 1 step 2 - v2] weights_header {manifest_digest: 000102030405060708090a0b0c0d0e0f from_chunk: 3}"
    )


def test_names_of_kinds_texts_lists_and_maps_are_in_words():
    directive = pb.Directive(kind=pb.DIRECTIVE_KIND_MOVE, parent=pb.Ancestor(id="p-1", incarnation=2))
    assert _words(pb.WorkResponse(directive=directive)).endswith(
        'directive {kind: DIRECTIVE_KIND_MOVE parent: {id: "p-1" incarnation: 2}}'
    )
    hello = pb.Hello(held=[pb.Block(lo=1, hi=2)], capacities={"a": 1.0})
    assert "{held: [{lo: 1 hi: 2}] capacities: {" in _words(pb.WorkRequest(hello=hello))
