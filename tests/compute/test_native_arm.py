"""The native forward as a 64-bit ARM would run it, under qemu: the tests of test_native.py, as they are.

They tell whether results are right, nothing of speed.
"""

from __future__ import annotations

import pytest
from emulated_library import ARM_CPUS, arm_library, places_of_structs
from test_native import (
    model_dir,
    test_a_packed_matrix_multiplies_as_unpacked,
    test_a_product_of_a_row_has_the_same_bits_at_every_number_of_rows,
    test_a_row_has_the_same_bits_in_every_batch,
    test_an_adapter_on_all_modules_adds_what_peft_adds,
    test_drafts_change_no_token_at_16_bits_or_fewer,
    test_sixteen_bits_and_fewer_stay_close_to_transformers,
)

__all__ = [
    "model_dir",
    "test_a_packed_matrix_multiplies_as_unpacked",
    "test_a_product_of_a_row_has_the_same_bits_at_every_number_of_rows",
    "test_a_row_has_the_same_bits_in_every_batch",
    "test_an_adapter_on_all_modules_adds_what_peft_adds",
    "test_drafts_change_no_token_at_16_bits_or_fewer",
    "test_sixteen_bits_and_fewer_stay_close_to_transformers",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=ARM_CPUS)
def library(request, tmp_path_factory):
    with (
        arm_library(request.param, tmp_path_factory.mktemp("arm")) as emulated,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("specserve.compute.native.choice.load_library", lambda name=None: emulated)
        yield emulated


def test_structs_lie_alike(library):
    assert library.functions.layout() == places_of_structs()
