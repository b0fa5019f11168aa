"""Whose settings are whose: what an update replaces."""

import msgspec
import pytest

from specserve import __version__ as specserve_version
from specserve.config import RayConfig
from specserve.errors import UserError
from specserve.ray import parts
from specserve.ray.addresses import by_address
from specserve.ray.parts import front_part, packed, replica_part, served, unpacked, version_of

BEFORE = RayConfig(model="m", api_key="secret", port=8000, max_num_seqs=8, num_threads=2, num_replicas=2)


@pytest.mark.parametrize(
    ("change", "replaces_front", "replaces_replicas"),
    [
        ({"num_replicas": 3, "max_replicas": 5, "scale_up_delay_s": 1.0}, False, False),
        (
            {"replica_cpus": 2.0, "ray_address": "auto", "front_node": "10.0.0.2"},
            False,
            False,
        ),  # Ray Serve sees resources itself
        ({"max_num_seqs": 16}, False, True),
        ({"kv_cache_gib": 1.0, "base_head": "head"}, False, True),
        ({"port": 8001}, True, False),
        ({"api_key": "other"}, True, False),
        ({"model": "n"}, True, True),
        ({"shared_store": "/store"}, True, True),
    ],
)
def test_only_what_reads_a_changed_setting_is_replaced(change, replaces_front, replaces_replicas):
    after = msgspec.structs.replace(BEFORE, **change)
    assert (version_of(front_part(after)) != version_of(front_part(BEFORE))) == replaces_front
    assert (version_of(replica_part(after)) != version_of(replica_part(BEFORE))) == replaces_replicas


def test_each_part_has_what_it_reads_and_no_secret_of_the_front_reaches_a_replica():
    front, replica = front_part(BEFORE), replica_part(BEFORE)
    assert (front.api_key, front.port, front.model) == ("secret", 8000, "m")
    assert (replica.api_key, replica.max_num_seqs, replica.num_threads, replica.model) == (None, 8, 2, "m")
    assert served(front) == served(replica) == served(BEFORE)


def test_settings_of_another_specserve_are_refused_by_both_names(monkeypatch):
    sent = packed(replica_part(BEFORE))
    assert unpacked(sent) == replica_part(BEFORE)
    later = sent.replace(b'"num_threads"', b'"threads"')
    monkeypatch.setattr(parts, "__version__", "9.9")
    for each in (sent, later):
        with pytest.raises(UserError, match=f"specserve 9.9 is installed on .*is of specserve {specserve_version}"):
            unpacked(each)


def test_a_front_on_all_addresses_is_told_by_its_machines():
    assert by_address("http://0.0.0.0:8000", "10.0.0.2") == "http://10.0.0.2:8000"
    assert by_address("http://[::]:8000", "fd00::2") == "http://[fd00::2]:8000"
    assert by_address("http://10.0.0.9:8000", "10.0.0.2") == "http://10.0.0.9:8000"
