"""The listening socket with real connections: who is let in when there are too many, and for how long."""

import asyncio
from contextlib import asynccontextmanager

from aiohttp import web

from cloud_hub.admin.listener import MAX_CONNECTIONS, Listener, most_connections

ASK = b"GET / HTTP/1.1\r\nHost: hub\r\n%s\r\n"
TRUSTED = ASK % b"Authorization: yes\r\n"
STRANGE = ASK % b""


@asynccontextmanager
async def listening(max_connections=3, patience_s=60.0):
    """Connects to a server that trusts whoever shows any token."""

    async def handle(request):
        if "Authorization" in request.headers:
            listener.trust(request.protocol)
        return web.Response(text="fine")

    server = web.Server(handle)
    listener = Listener(server, max_connections=max_connections, patience_s=patience_s)
    port = await listener.start("127.0.0.1", 0, None)
    made = []

    async def connect(say=b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        made.append(writer)
        writer.write(say)
        answer = await reader.readuntil(b"fine") if say else b""
        assert answer.startswith(b"HTTP/1.1 200 OK") or not say
        return reader, writer

    try:
        yield connect
    finally:
        listener.stop()
        for writer in made:
            writer.close()
        await server.shutdown(1.0)


async def is_closed(connection):
    """Waits until the other side has closed it."""
    try:
        return await asyncio.wait_for(connection[0].read(1), 10) == b""
    except ConnectionError:
        return True


async def answers(connection, say=STRANGE):
    reader, writer = connection
    writer.write(say)
    return (await asyncio.wait_for(reader.readuntil(b"fine"), 10)).startswith(b"HTTP/1.1 200 OK")


def test_when_there_is_no_room_the_stranger_who_came_first_goes():
    async def scenario():
        async with listening() as connect:
            trusted, first, second = await connect(TRUSTED), await connect(STRANGE), await connect(STRANGE)
            third = await connect(STRANGE)
            assert await is_closed(first)
            assert await answers(trusted)
            assert await answers(second)
            assert await answers(third)

    asyncio.run(scenario())


def test_a_flood_of_strangers_keeps_nobody_out():
    async def scenario():
        async with listening(max_connections=5) as connect:
            trusted = await connect(TRUSTED)
            for _ in range(40):
                await connect()
            assert await answers(trusted)
            assert await answers(await connect(), TRUSTED)

    asyncio.run(scenario())


def test_where_everybody_is_trusted_who_comes_too_late_is_closed_and_may_come_again():
    async def scenario():
        async with listening(max_connections=2) as connect:
            first, second = await connect(TRUSTED), await connect(TRUSTED)
            assert await is_closed(await connect())
            assert await answers(first)
            first[1].close()
            await first[1].wait_closed()
            assert await answers(second)
            assert await answers(await connect(), TRUSTED)

    asyncio.run(scenario())


def test_a_stranger_is_given_so_long_and_whoever_is_trusted_stays():
    async def scenario():
        async with listening(patience_s=0.2) as connect:
            trusted, silent, slow = await connect(TRUSTED), await connect(), await connect(STRANGE)
            slow[1].write(STRANGE[:5])
            assert await is_closed(silent)
            assert await is_closed(slow)
            assert await answers(trusted)

    asyncio.run(scenario())


def test_connections_are_a_share_of_the_files_that_the_process_may_have(monkeypatch):
    for soft, most in ((1024, 256), (65_536, MAX_CONNECTIONS), (-1, MAX_CONNECTIONS), (2, 1)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_connections() == most
