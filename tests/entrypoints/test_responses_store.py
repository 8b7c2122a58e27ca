"""Stored responses: continued, read, cancelled, deleted; bounded in every way; apart for each API key."""

from __future__ import annotations

import concurrent.futures
import itertools
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest

from tests.entrypoints.served import Served, serving
from tests.entrypoints.test_tool_calls import CALL, OFFERED, qwen3, saying
from tokenspeed.entrypoints.limits import OFF_LOOP_BYTES, Limits
from tokenspeed.entrypoints.responses_store import ResponseStore

ROUTE = "/v1/responses"
TOOLS: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in OFFERED]
KEYS = {"one": {"Authorization": "Bearer one"}, "two": {"Authorization": "Bearer two"}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(template=qwen3(), max_model_len=8192) as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "input": "Weather?", "max_output_tokens": 500, **fields}


def created(served: Served, **fields: Any) -> dict[str, Any]:
    reply = served.post(ROUTE, body(**fields))
    assert reply.status == 200, reply.text
    if not fields.get("stream"):
        return dict(reply.json())
    return dict(msgspec.json.decode(reply.text.rpartition("data: ")[2])["response"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_stored_is_what_was_answered_and_only_when_asked_for(served: Served, stream: bool) -> None:
    with saying(served, f"Yes.\n{CALL}"):
        kept = created(served, stream=stream, store=True, tools=TOOLS)
        gone = created(served, stream=stream, tools=TOOLS)
    assert served.get(f"{ROUTE}/{kept['id']}").json() == kept
    reply = served.get(f"{ROUTE}/{gone['id']}")
    assert (reply.status, reply.error["code"], gone["store"]) == (404, "response_not_found", False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_continued_response_is_prompted_like_its_whole_conversation(served: Served, stream: bool) -> None:
    said = f"<think>\nhm\n</think>\n\nOne moment.\n{CALL}"
    with saying(served, said):
        first = created(served, stream=stream, store=True, tools=TOOLS, instructions="Be brief.")
        prompt = served.engine.submitted[-1]["ids"]
    result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "sunny"}
    with saying(served, "Sunny."):
        second = created(
            served, stream=stream, store=True, tools=TOOLS, instructions="Be brief.",
            previous_response_id=first["id"], input=[result],
        )  # fmt: skip
        continued = served.engine.submitted[-1]["ids"]
        history = [{"role": "user", "content": "Weather?"}, *first["output"], result]
        created(served, tools=TOOLS, instructions="Be brief.", input=history)
        assert served.engine.submitted[-1]["ids"] == continued
        created(served, tools=TOOLS, previous_response_id=second["id"], input="Thanks")
        third = served.engine.submitted[-1]["ids"]
    assert continued[: len(prompt)] == prompt
    assert bytes(third[-200:]).find(b"Sunny.") >= 0
    assert b"Be brief." not in bytes(third), "instructions are not inherited"
    assert second["previous_response_id"] == first["id"]


def test_a_response_that_is_not_stored_cannot_be_continued(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Hi"):
        gone = created(served)
    for id in (gone["id"], "resp_never", ""):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="echo", input="x", previous_response_id=id)
        assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_items_can_be_meant_by_their_ids(served: Served) -> None:
    with saying(served, "Yes."):
        first = created(served, store=True, input=[{"role": "user", "content": "x", "id": "msg_mine"}])
        said = first["output"][0]["id"]
        references = [{"type": "item_reference", "id": "msg_mine"}, {"id": said}, {"role": "user", "content": "y"}]
        created(served, input=references, store=True)
        meant = served.engine.submitted[-1]["ids"]
        spelled = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Yes."}, references[-1]]
        created(served, input=spelled)
    assert served.engine.submitted[-1]["ids"] == meant
    reply = served.post(ROUTE, body(input=[references[0], {"type": "item_reference", "id": "msg_none"}]))
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, "input[1].id", "item_not_found")


def test_input_items_are_listed_in_pages_with_ids(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Yes."):
        first = created(served, store=True)
        items = [{"role": "user", "content": f"{number}"} for number in range(5)]
        second = created(served, store=True, previous_response_id=first["id"], input=items)
    listed = list(client.responses.input_items.list(second["id"], order="asc", limit=3))
    assert len(listed) == 7, "the client reads all pages"
    assert [item.type == "message" and item.content[0].text for item in listed] == ["Weather?", "Yes.", *"01234"]
    assert len({item.id for item in listed}) == 7 and listed[1].id == first["output"][0]["id"]
    page = served.get(f"{ROUTE}/{second['id']}/input_items?limit=2").json()
    assert [item["id"] for item in page["data"]] == [listed[6].id, listed[5].id]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (listed[6].id, listed[5].id, True)
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nobody"):
        reply = served.get(f"{ROUTE}/{second['id']}/input_items?{query}")
        assert (reply.status, reply.error["param"]) == (400, query.partition("=")[0])


def test_a_deleted_response_is_gone(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Yes."):
        id = created(served, store=True)["id"]
    client.responses.delete(id)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        reply = served.send(method, f"{ROUTE}/{id}{path}")
        assert (reply.status, reply.error["code"]) == (404, "response_not_found"), (method, path)


def test_a_stored_response_is_not_streamed_again(served: Served) -> None:
    with saying(served, "Yes."):
        id = created(served, store=True)["id"]
    assert served.get(f"{ROUTE}/{id}?stream=false").status == 200
    assert served.get(f"{ROUTE}/{id}?stream=true").error["param"] == "stream"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_cancelling_ends_a_running_response_and_its_stream_says_so(
    served: Served, client: openai.OpenAI, stream: bool, store: bool
) -> None:
    served.call(served.engine.gate.clear)
    with saying(served, "Yes."), concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, ROUTE, body(stream=stream, store=store))
        served.wait_until(lambda: bool(served.door.active))
        (id,) = served.call(lambda: list(served.door.active))
        running = client.responses.retrieve(id)
        assert (running.status, running.output, running.usage) == ("in_progress", [], None)
        cancelled = client.responses.cancel(id)
        reply = waiting.result(10)
        served.call(served.engine.gate.set)
    assert cancelled.status == "cancelled"
    if stream:
        last = msgspec.json.decode(reply.text.rpartition("data: ")[2])
        assert last["type"] == "response.incomplete"
        told = last["response"]
    else:
        told = reply.json()
    assert told["status"] == "cancelled" and told["id"] == id
    assert served.get(f"{ROUTE}/{id}").status == (200 if store else 404)
    if store:
        assert served.get(f"{ROUTE}/{id}").json() == told
        assert client.responses.cancel(id).status == "cancelled", "a second time changes nothing"
    assert not served.engine.streams and not served.door.active


def test_a_response_that_has_ended_cannot_be_cancelled(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Yes."):
        id = created(served, store=True)["id"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.cancel(id)
    assert "completed" in str(refused.value)


def test_deleting_a_running_response_ends_it_and_keeps_nothing(served: Served, client: openai.OpenAI) -> None:
    served.call(served.engine.gate.clear)
    with saying(served, "Yes."), concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, ROUTE, body(store=True))
        served.wait_until(lambda: bool(served.door.active))
        (id,) = served.call(lambda: list(served.door.active))
        client.responses.delete(id)
        assert waiting.result(10).json()["status"] == "cancelled"
        served.call(served.engine.gate.set)
    assert served.get(f"{ROUTE}/{id}").status == 404


def test_references_to_much_again_and_again_are_refused_before_they_are_read(served: Served) -> None:
    item = {"type": "message", "id": "msg_long", "role": "user", "content": "x" * 450}
    with saying(served, "Yes."):
        created(served, store=True, input=[item])
    reply = served.post(ROUTE, body(input=[{"type": "item_reference", "id": "msg_long"}] * 4000))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    prompt = int(re.search(r"\((\d+) in the", reply.error["message"])[1])  # type: ignore[index]
    assert 8192 < prompt < 8200, "told as soon as it is too much, and not of all 2 MB"


def test_a_small_body_that_recalls_much_is_worked_on_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(max_model_len=200_000) as served:
        id = served.post(ROUTE, body(store=True, input="x" * OFF_LOOP_BYTES, max_output_tokens=4)).json()["id"]
        sizes: list[int] = []
        off_loop = served.door.off_loop

        async def measured(size: int, work: Any, *arguments: Any) -> Any:
            sizes.append(size)
            return await off_loop(size, work, *arguments)

        monkeypatch.setattr(served.door, "off_loop", measured)
        served.post(ROUTE, body(previous_response_id=id, max_output_tokens=4))
        assert len(sizes) >= 2 and min(sizes) > OFF_LOOP_BYTES


def test_no_key_finds_what_another_one_stored() -> None:
    with serving(user_keys=("one", "two")) as served:
        made = served.post(ROUTE, body(store=True, input="x", max_output_tokens=20), **KEYS["one"]).json()
        item = made["output"][0]["id"]
        assert served.get(f"{ROUTE}/{made['id']}", **KEYS["one"]).status == 200
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert served.send(method, f"{ROUTE}/{made['id']}{path}", headers=KEYS["two"]).status == 404
            assert served.send(method, f"{ROUTE}/{made['id']}{path}").status == 401
        for fields in ({"previous_response_id": made["id"]}, {"input": [{"type": "item_reference", "id": item}]}):
            for key, status in (("two", 400), ("one", 200)):
                assert served.post(ROUTE, body(max_output_tokens=20, **fields), **KEYS[key]).status == status
        assert served.get(f"{ROUTE}/{made['id']}", **KEYS["one"]).status == 200


# The store by itself ----------------------------------------------------------------------------------


def item(id: str, size: int = 100) -> bytes:
    return msgspec.json.encode({"id": id, "text": "x" * size})


def keep(store: ResponseStore, id: str, items: tuple[bytes, ...] = (), *said: str) -> None:
    store.begin(id, b"{}", items, keeps=True)
    store.end(id, b"{}", [{"id": name, "text": "x" * 100} for name in said])


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(Limits(max_stored_responses=3))
    for id in "abc":
        keep(store, id)
    assert store.kept("a") is not None
    keep(store, "d")
    assert [store.kept(id) is not None for id in "abcd"] == [True, False, True, True]


def talk(store: ResponseStore, turns: int) -> tuple[bytes, ...]:
    """The items of a conversation after these turns, each continuing the one before."""
    context: tuple[bytes, ...] = ()
    for turn in range(turns):
        keep(store, f"r{turn}", (*context, item(f"in{turn}")), f"out{turn}")
        context = store.conversation(f"r{turn}") or ()
    return context


def test_turns_of_one_conversation_share_its_items() -> None:
    store = ResponseStore(Limits())
    context = talk(store, 8)
    assert [msgspec.json.decode(each)["id"] for each in context[-2:]] == ["in7", "out7"] and len(context) == 16
    assert store.num_bytes == sum(map(len, context)) + 8 * len(b"{}")


def test_bytes_are_bounded() -> None:
    size = len(item("i0")) + len(b"{}")
    store = ResponseStore(Limits(max_stored_bytes=3 * size))
    for number in range(9):
        keep(store, f"r{number}", (item(f"i{number}"),))
        assert store.num_bytes == min(number + 1, 3) * size
    assert [number for number in range(9) if store.kept(f"r{number}") is not None] == [6, 7, 8]
    keep(store, "big", (item("huge", 5000),))
    assert (store.kept("big"), store.num_bytes, store.item("huge")) == (None, 0, None)


def test_everything_is_given_back_with_the_last_response_that_has_it() -> None:
    store = ResponseStore(Limits())
    shared = item("shared")
    keep(store, "a", (shared,), "own")
    keep(store, "b", (shared, shared))
    assert store.item("own") == item("own")
    store.delete("a")
    assert store.item("shared") is shared and store.item("own") is None
    store.delete("b")
    assert (store.item("shared"), store.num_bytes) == (None, 0)


def test_a_response_that_is_continued_has_been_used() -> None:
    store = ResponseStore(Limits(max_stored_responses=2))
    keep(store, "a")
    keep(store, "b")
    store.begin("c", b"{}", store.conversation("a") or (), keeps=True, continues="a")
    store.end("c", b"{}", [])
    assert (store.kept("a") is None, store.kept("b") is None) == (False, True)


def test_age_counts_from_the_last_use() -> None:
    now = 0.0
    store = ResponseStore(Limits(stored_seconds=10.0), clock=lambda: now)
    keep(store, "a")
    keep(store, "b")
    now = 8.0
    assert store.kept("a") is not None
    now = 12.0
    assert store.kept("b") is None and store.kept("a") is not None
    now = 30.0
    assert store.conversation("a") is None
    keep(store, "c")
    assert store.num_bytes == 2


def test_two_items_of_one_id_are_found_by_the_later_one() -> None:
    store = ResponseStore(Limits())
    for id, number in itertools.product("m", range(2)):
        keep(store, f"r{number}", (item(id, number),))
    assert store.item("m") == item("m", 1)
    store.delete("r0")
    assert store.item("m") == item("m", 1)
