"""What the server says when it is ready, as a person sees it."""

import re

from specserve import __version__
from specserve.config import ServeConfig
from specserve.messages import EngineInfo
from specserve.server.banner import banner

INFO = EngineInfo(
    "/m", "LlamaForCausalLM", 320, 8192, 8, 16, "cpu", "bfloat16", 1, [2], "avx2", 64, 4096, [(1, 26.04), (8, 161.3)]
)
URL = "http://127.0.0.1:8000"


def test_it_says_what_is_served_how_fast_and_where():
    config = ServeConfig(adapters_dir="adapters")
    assert banner(URL, config, "base", INFO, ["one", "two"]) == (
        f"specserve {__version__} is ready at http://127.0.0.1:8000\n"
        "  model     base, bfloat16 on cpu, 8192 tokens of context\n"
        "  kernels   avx2\n"
        "  speed     tokens/s without drafts: 26 with one sequence, 161 with 8 at a time\n"
        "  adapters  one, two\n"
        "  page      http://127.0.0.1:8000/\n"
        "  API       http://127.0.0.1:8000/v1"
    )


def test_it_says_who_may_ask_where_that_is_not_this_machine():
    open_to_all = banner("http://0.0.0.0:8000", ServeConfig(host="0.0.0.0"), "base", INFO, [])
    assert "is ready at http://0.0.0.0:8000\n" in open_to_all and "API       http://localhost:8000/v1" in open_to_all
    assert open_to_all.endswith("open to everybody who reaches 0.0.0.0; --api-key asks for a key")
    assert "adapters" not in open_to_all
    assert banner(URL, ServeConfig(api_key="secret"), "base", INFO, []).endswith("access    with a key")
    assert "secret" not in banner(URL, ServeConfig(api_key="secret"), "base", INFO, [])


def test_it_stays_short_and_is_safe_on_a_terminal():
    config = ServeConfig(adapters_dir="here", quantization="int8")
    names = [f"a{idx}" for idx in range(1000)]
    text = banner(URL, config, "evil\x1b[2J\nname", INFO, names, has_colour=True)
    assert "a7 and 992 more" in text and "int8 (bfloat16)" in text
    plain = re.sub(r"\x1b\[\d+m", "", text)
    assert "\x1b" not in plain and len(plain.splitlines()) == 7
    assert "none yet in here" in banner(URL, config, "base", INFO, [])


def test_any_loopback_address_is_this_machine():
    for host in ("127.0.0.2", "::1", "localhost"):
        assert "open to everybody" not in banner(URL, ServeConfig(host=host), "base", INFO, [])


def test_a_server_says_so_and_its_log_names_who_speaks(server):
    log = "".join(server.log)
    ready = log.index("is ready at")
    assert re.search(
        r"\n  speed     tokens/s without drafts: [\d.e+]+ with one sequence, [\d.e+]+ with 8 at a time\n", log
    )
    assert f"  page      {server.url}/\n" in log[ready:]
    assert re.search(r"\d INFO engine: ", log) and re.search(r"\d INFO server: tool calls: ", log)
