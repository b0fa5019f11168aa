"""What moves between the choice of an adapter and its load moves the choice; what a caller may not use is no choice."""

import asyncio
import shutil
from types import SimpleNamespace

import msgspec
import pytest

from specserve.adapter_kinds import check_kind
from specserve.errors import OverloadedError, UserError
from specserve.routing_profile import PROFILE_FILE, RoutingProfile, write_profile
from specserve.server.adapter_names import AdapterNames
from specserve.server.openai.request_types import ChatRequest, CompletionRequest
from specserve.server.routing import profiles
from specserve.server.routing import router as router_module
from specserve.server.routing.router import Router

FOXES = "Count the foxes in this sentence: "
SHIPS = "Translate this ship's log: "


class Store:
    """The names of a folder, and looks at them."""

    def __init__(self, root):
        self._names = AdapterNames(str(root), "base")
        self.names, self.path, self.given_names = self._names.all, self._names.path, self._names.given
        self.roots = self._names.paths.roots
        self.is_away = False

    async def look(self, function, *args):
        if self.is_away:
            raise OverloadedError("away")
        return function(*args)


def add(root, name, words):
    (root / name).mkdir()
    (root / name / "adapter_config.json").write_text("{}")
    write_profile(root / name, RoutingProfile(tuple(f"{words} number {idx}" for idx in range(16))))


@pytest.fixture
def root(tmp_path):
    add(tmp_path, "foxes", FOXES)
    add(tmp_path, "ships", SHIPS)
    return tmp_path


@pytest.fixture
def store(root):
    return Store(root)


def caller(*names):
    return SimpleNamespace(may_use=lambda name: not names or name in names)


def asked(text):
    return CompletionRequest(prompt=text)


async def found(name):
    return name


def route(store, text, load=found, who=None):
    async def run():
        return await Router(store, "base").route(asked(text), who or caller(), load)

    return asyncio.run(run())


def test_each_finds_its_own_and_others_find_the_base_model(store):
    assert route(store, FOXES + "number 99")[1] == "foxes"
    assert route(store, SHIPS + "number 99")[1] == "ships"
    assert route(store, "What is the capital of Australia?")[1] is None


def test_a_caller_gets_and_hears_of_its_own_adapters_only(store):
    routing, name = route(store, FOXES + "number 99", who=caller("ships"))
    assert name is None and [other.adapter for other in routing.others] == ["ships"]


def test_one_that_went_between_the_choice_and_the_load_is_not_chosen_again(store, root):
    tried = []

    async def load(name):
        tried.append(name)
        if name == "foxes":
            shutil.rmtree(root / "foxes")
            store.path("foxes")
        return name

    routing, name = route(store, FOXES + "number 99", load)
    assert tried == ["foxes", None] and name is None and routing.adapter is None
    assert [other.adapter for other in routing.others] == ["ships"]


def test_one_that_was_replaced_between_the_choice_and_the_load_is_judged_anew(store, root):
    tried = []

    async def load(name):
        tried.append(name)
        if len(tried) == 1:
            shutil.rmtree(root / "foxes")
            add(root, "foxes", "Sing a song of sixpence")
        return name

    assert route(store, FOXES + "number 99", load)[1] is None
    assert tried == ["foxes", None]


def test_one_that_never_holds_still_is_an_error_and_not_a_loop(store, root):
    async def load(name):
        shutil.rmtree(root / "foxes")
        add(root, "foxes", FOXES)
        return name

    with pytest.raises(UserError, match="changes while it is read"):
        route(store, FOXES + "number 99", load)


def test_one_of_another_kind_is_no_choice(store, root):
    async def load(name):
        if name == "foxes":
            check_kind(name, "classify", ("generate",))
        return name

    assert route(store, FOXES + "number 99", load)[1] is None
    (root / "foxes" / "pooling_config.json").write_text("{}")
    routing, _ = route(store, FOXES + "number 99")
    assert [other.adapter for other in routing.others] == ["ships"]  # it is not even loaded


def test_one_that_cannot_be_loaded_is_an_error(store):
    async def load(name):
        raise UserError("broken", code="invalid_adapter")

    with pytest.raises(UserError, match="broken"):
        route(store, FOXES + "number 99", load)


def test_adapters_that_come_change_and_go_are_seen(store, root, monkeypatch):
    monkeypatch.setattr(router_module, "LOOK_EVERY_S", 0.0)

    async def run():
        router = Router(store, "base")

        async def now(text):
            return (await router.route(asked(text), caller(), found))[1]

        assert await now("Praise the weather of today, number 7") is None
        add(root, "weather", "Praise the weather of today,")
        assert await now("Praise the weather of today, number 7") == "weather"
        (root / "weather" / PROFILE_FILE).write_text('{"prompts": 1}')
        assert await now("Praise the weather of today, number 7") is None
        shutil.rmtree(root / "foxes")
        assert await now(FOXES + "number 99") is None
        store.is_away = True
        assert await router._profiles.now()  # what was known stays

    asyncio.run(run())


def test_a_look_that_takes_longer_than_a_request_waits_is_not_begun_again(store, monkeypatch):
    monkeypatch.setattr(profiles, "LOOK_TIMEOUT_S", 0.01)
    num_looks, may_end = 0, asyncio.Event()

    async def slow(function, *args):
        nonlocal num_looks
        if function.__name__ == "_read_all":
            num_looks += 1
            await may_end.wait()
        return function(*args)

    async def run():
        store.look = slow
        router = Router(store, "base")

        async def now():
            return (await router.route(asked(FOXES + "number 99"), caller(), found))[1]

        assert await asyncio.gather(now(), now(), now()) == [None] * 3 and await now() is None
        may_end.set()
        await asyncio.sleep(0.05)
        assert await now() == "foxes" and num_looks == 1

    asyncio.run(run())


def test_a_profile_that_leaves_the_folder_is_not_read(store, root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    shutil.move(root / "foxes" / PROFILE_FILE, outside / PROFILE_FILE)
    (root / "foxes" / PROFILE_FILE).symlink_to(outside / PROFILE_FILE)
    assert route(store, FOXES + "number 99")[1] is None


def test_what_is_named_auto_goes_before(store, root):
    async def is_asked(*args, base="base", who=None):
        return await Router(store, base).is_asked(who or caller(), *args)

    assert asyncio.run(is_asked("auto", None))
    assert not asyncio.run(is_asked(None, None)) and not asyncio.run(is_asked("auto", "foxes"))
    assert not asyncio.run(is_asked("auto", None, base="auto"))
    add(root, "auto", "x")
    assert not asyncio.run(is_asked("auto", None))
    assert asyncio.run(is_asked("auto", None, who=caller("foxes")))  # for whom it is not there


@pytest.mark.parametrize("prompt", [[1, 2], ["a", "b"], [[1]], []])
def test_a_prompt_that_is_not_one_text_names_no_adapter(store, prompt):
    with pytest.raises(UserError, match="one text") as error:
        route(store, prompt)
    assert error.value.param == "prompt"


def test_a_chat_is_compared_by_what_the_model_was_told(store):
    messages = [{"role": "user", "content": [{"type": "text", "text": FOXES + "number 99"}]}]
    messages += [{"role": "assistant", "content": SHIPS * 9}, {"role": "user", "content": FOXES + "number 3"}]
    request = msgspec.convert({"messages": messages}, ChatRequest)

    async def run():
        return await Router(store, "base").route(request, caller(), found)

    assert asyncio.run(run())[1] == "foxes"
