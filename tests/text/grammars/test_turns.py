"""Places are given to tenants in turn."""

from __future__ import annotations

import asyncio

from tokenspeed.text.grammars.turns import Turns


def test_who_has_many_waiting_holds_up_nobody_else() -> None:
    async def run() -> None:
        turns, order = Turns(1), []

        async def work(tenant: bytes, name: str) -> None:
            async with turns.place(tenant):
                order.append(name)
                await asyncio.sleep(0)

        flood = [work(b"a", f"a{number}") for number in range(5)]
        await asyncio.gather(*flood, work(b"b", "b0"), work(b"b", "b1"), work(b"c", "c0"))
        assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]

    asyncio.run(run())


def test_who_leaves_takes_no_place() -> None:
    async def run() -> None:
        turns, inside = Turns(2), 0

        async def work(tenant: bytes) -> None:
            nonlocal inside
            async with turns.place(tenant):
                inside += 1
                assert inside <= 2
                try:
                    await asyncio.sleep(0.001)
                finally:
                    inside -= 1

        for leaving in range(12):
            tasks = [asyncio.create_task(work(b"%d" % (number % 3))) for number in range(8)]
            for _ in range(leaving):
                await asyncio.sleep(0)
            for task in tasks[leaving % 4 :: 2]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert not any(isinstance(outcome, Exception) for outcome in outcomes)
            await asyncio.wait_for(asyncio.gather(*(work(b"x") for _ in range(4))), 30)
            assert turns._free == 2

    asyncio.run(run())


def test_who_leaves_does_not_cost_the_tenant_its_turn() -> None:
    async def run() -> None:
        turns, order = Turns(1), []

        async def work(tenant: bytes, name: str) -> None:
            async with turns.place(tenant):
                order.append(name)
                await asyncio.sleep(0)

        names = ("a0", "b0", "b1", "c0")
        tasks = [asyncio.create_task(work(name[:1].encode(), name)) for name in names]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a0", "b1", "c0"]

    asyncio.run(run())
