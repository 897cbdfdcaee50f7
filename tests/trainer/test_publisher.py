"""The publisher against a service that the test plays frame by frame: credit, damage, reconnections, endings."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
import zmq
from tests.helpers.scripted_http import HANG_UP, Answer, ScriptedHttp, refusal

from flashrl_trainer.outgoing import Held, Outgoing
from flashrl_trainer.publisher import Publisher, Sent
from flashrl_trainer.rollout_client import RolloutClient, ServiceUnreachableError
from flashrl_wire import digest, frames
from flashrl_wire.codec import chunk_hash
from flashrl_wire.errors import BadUpdateError, UpdateInProgressError
from flashrl_wire.frames import ChunkFrame, Credit, Failed, Frame, Hello, Resend, Staged
from flashrl_wire.layout import WeightLayout
from flashrl_wire.messages import Chunk

ID = "transfer-1"
PAYLOADS = [b"a" * 10, b"b" * 10, b"c" * 10]
LIMIT_S = 10.0
BEGIN, COMMIT, ABORT = "POST /load_weights", f"POST /load_weights/{ID}/commit", f"DELETE /load_weights/{ID}"
NOTHING = WeightLayout(())
DIGEST = digest.Combiner(()).combine({})


def update(kind: str = "delta") -> Outgoing:
    """Version 8 of a model without tensors: the publisher looks at digests and the layout's hash only."""
    chunks = [Chunk(raw_bytes=20, wire_bytes=len(payload), hash=chunk_hash(payload)) for payload in PAYLOADS]
    base = Held(7, DIGEST) if kind == "delta" else None
    return Outgoing(base, Held(8, DIGEST), NOTHING.hash, 5, [], chunks, list(PAYLOADS))


class Service:
    """Both planes of a service, played by the test; `publish` runs the publisher beside it."""

    def __init__(self, http: ScriptedHttp) -> None:
        self.http = http
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        port: int = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._pool = ThreadPoolExecutor(1)
        self._peer = b""
        self.acknowledged: list[int] = []
        accepted = {"transfer_id": ID, "weights_port": port, "credit_bytes": 20, "deadline_s": 9}
        self.accepted = Answer(accepted, 202)
        http.on("GET /weights", self.weights(7, "f" * 32))
        http.on(BEGIN, self.accepted)
        http.on(COMMIT, self.committed())
        http.on(ABORT, Answer({}))

    def weights(self, version: int, digest: str) -> Answer:
        """GET /weights, with an update behind it."""
        last = {"kind": "delta", "version": 8, "changed_elements": 5, "wire_bytes": 30, "pause_ms": 1.5, "seconds": 1}
        body = {"version": version, "digest": digest, "quantization": "int8", "storage_bytes": 10, "last_update": last}
        body |= {"model": "m", "layout_hash": NOTHING.hash, "tokenizer_hash": "2" * 32, "vocab_size": 9}
        return Answer(body | {"max_model_len": 99, "weights_port": 5, "run_id": None, "poisoned": False})

    def committed(self) -> Answer:
        """The reply to a commit."""
        return Answer({"version": 8, "digest": DIGEST, "pause_ms": 2.5, "changed_elements": 5, "wire_bytes": 30})

    def publish(self, what: Outgoing | None = None, *, deadline_s: float = LIMIT_S) -> "Future[Sent]":
        """The publisher at work on version 8, tried once, in a thread of its own."""
        client = RolloutClient(self.http.url, None, request_timeout_s=LIMIT_S, retry_s=0.0)
        publisher = Publisher(client, "run-a", deadline_s=deadline_s, keys=None)
        return self._pool.submit(publisher.publish, what or update(), self.acknowledged.append)

    def hear(self) -> tuple[Frame, bytes | None]:
        """The next frame, and its payload."""
        assert self._router.poll(int(LIMIT_S * 1000)), "nothing came"
        self._peer, header, *payload = self._router.recv_multipart()
        return frames.unpack(header), payload[0] if payload else None

    def chunks(self, *indices: int) -> None:
        """The next frames are these chunks, whole."""
        assert [self.hear() for _ in indices] == [(ChunkFrame(ID, i), PAYLOADS[i]) for i in indices]

    def hears_nothing(self) -> bool:
        """For longer than the publisher's round takes."""
        return not self._router.poll(250)

    def say(self, *said: Frame) -> None:
        """To whoever was heard last."""
        for frame in said:
            self._router.send_multipart([self._peer, frames.pack(frame)])

    def greeted(self, credit: int) -> None:
        """Hello is answered with a window."""
        assert self.hear() == (Hello(ID), None)
        self.say(Credit(ID, credit, -1))

    def staged(self) -> None:
        """Take everything without a word."""
        self.greeted(1000)
        self.chunks(0, 1, 2)
        self.say(Staged(ID))

    def close(self) -> None:
        """End the publisher's thread and the socket."""
        self._router.close(0)
        self._pool.shutdown()


@pytest.fixture
def service() -> Iterator[Service]:
    with ScriptedHttp().serving() as http:
        service = Service(http)
        yield service
        service.close()


def asked(service: Service, *routes: str) -> list[int]:
    """How often."""
    return [len(service.http.asked[route]) for route in routes]


def test_never_more_is_under_way_than_was_granted(service: Service) -> None:
    sent = service.publish()
    service.greeted(25)
    service.chunks(0, 1)
    assert service.hears_nothing(), "5 bytes are left, the third chunk has 10"
    service.say(Credit(ID, 10, 0))
    service.chunks(2)
    service.say(Credit(ID, 10, 1), Credit(ID, 10, 2), Credit(ID, 10, 2), Staged(ID))
    done = sent.result(LIMIT_S)
    assert (done.kind, done.wire_bytes, done.reply.version, done.reply.pause_ms) == ("delta", 30, 8, 2.5)
    assert service.acknowledged == [10, 10, 10], "each chunk once, however often it is acknowledged"
    assert asked(service, COMMIT, ABORT) == [1, 0]


def test_manifest_says_what_the_update_starts_from(service: Service) -> None:
    """A delta from what was committed last, a snapshot from whatever is there."""
    for kind, base in (("delta", DIGEST), ("snapshot", "f" * 32)):
        sent = service.publish(update(kind))
        service.staged()
        assert sent.result(LIMIT_S).kind == kind
        manifest = service.http.asked[BEGIN][-1].body
        assert (manifest["kind"], manifest["run_id"], manifest["version"]) == (kind, "run-a", 8)
        assert (manifest["base_version"], manifest["base_digest"]) == (7, base)
        assert (manifest["digest"], manifest["layout_hash"]) == (DIGEST, NOTHING.hash)


def test_damaged_chunk_is_sent_again_within_its_credit(service: Service) -> None:
    sent = service.publish()
    service.greeted(10)
    service.chunks(0)
    service.say(Resend(ID, 0, "hash differs"))
    service.chunks(0)
    assert service.hears_nothing()
    service.say(Credit(ID, 10, 0))
    service.chunks(1)
    service.say(Credit(ID, 10, 1))
    service.chunks(2)
    service.say(Staged(ID))
    assert sent.result(LIMIT_S).wire_bytes == 30


def test_after_a_lost_connection_only_what_is_missing_is_sent(service: Service) -> None:
    """The service meets a stranger who says Hello: it grants a new window, and names what has arrived."""
    sent = service.publish()
    service.greeted(30)
    service.chunks(0, 1, 2)
    service.say(Credit(ID, 10, 1))  # 0 and 2 were lost with the old connection
    service.greeted(10)
    service.chunks(0)
    assert service.hears_nothing(), "the old window is gone"
    service.say(Credit(ID, 10, 0))
    service.chunks(2)
    service.say(Staged(ID))
    assert sent.result(LIMIT_S).wire_bytes == 30


def test_refused_chunks_end_in_the_services_own_error(service: Service) -> None:
    sent = service.publish()
    service.greeted(1000)
    service.chunks(0, 1, 2)
    service.say(Failed(ID, "bad_update", "norm.weight: index 99 is out of range"))
    with pytest.raises(BadUpdateError, match=r"^norm.weight: index 99 is out of range$"):
        sent.result(LIMIT_S)
    assert asked(service, COMMIT, ABORT) == [0, 1]


def test_silent_service_is_given_up_at_the_deadline(service: Service) -> None:
    sent = service.publish(deadline_s=0.5)
    assert service.hear() == (Hello(ID), None)
    with pytest.raises(ServiceUnreachableError, match=rf"^transfer {ID} did not get on for 0.5 s$"):
        sent.result(LIMIT_S)
    assert asked(service, COMMIT, ABORT) == [0, 1]


def test_answers_to_hello_are_no_progress(service: Service) -> None:
    sent = service.publish(deadline_s=0.5)
    service.greeted(0)
    while not wait([sent], 0.02).done:
        service.say(Credit(ID, 0, -1))
    with pytest.raises(ServiceUnreachableError, match="did not get on"):
        sent.result()


def test_lost_reply_to_a_commit_is_settled_by_what_the_service_holds(service: Service) -> None:
    service.http.on(COMMIT, HANG_UP)
    service.http.on("GET /weights", service.weights(7, "f" * 32), service.weights(8, DIGEST))
    sent = service.publish()
    service.staged()
    reply = sent.result(LIMIT_S).reply
    assert (reply.version, reply.digest, reply.pause_ms, reply.changed_elements) == (8, DIGEST, 1.5, 5)
    assert asked(service, COMMIT, ABORT) == [1, 0]


@pytest.mark.parametrize(("version", "digest"), [(7, "f" * 32), (8, "e" * 32), (7, "")])
def test_commit_that_was_lost_itself_is_an_error(service: Service, version: int, digest: str) -> None:
    service.http.on(COMMIT, HANG_UP)
    after = service.weights(version, digest or DIGEST)
    service.http.on("GET /weights", service.weights(7, "f" * 32), after)
    sent = service.publish()
    service.staged()
    with pytest.raises(ServiceUnreachableError, match="RemoteProtocolError"):
        sent.result(LIMIT_S)
    assert asked(service, COMMIT, ABORT) == [1, 1]


def test_left_over_transfer_of_this_run_is_ended_first(service: Service) -> None:
    """The trainer was killed while it sent, and its resumed run begins before the service has dropped that."""
    service.http.on(BEGIN, refusal(409, "update_in_progress", "under way", transfer_id="old"), service.accepted)
    service.http.on("DELETE /load_weights/old", Answer({}))
    sent = service.publish()
    service.staged()
    assert sent.result(LIMIT_S).reply.version == 8
    assert asked(service, BEGIN, "DELETE /load_weights/old", COMMIT) == [2, 1, 1]


def test_transfer_of_another_run_is_left_alone(service: Service) -> None:
    service.http.on(BEGIN, refusal(409, "update_in_progress", "the service follows run b", run_id="b"))
    with pytest.raises(UpdateInProgressError, match="follows run b"):
        service.publish().result(LIMIT_S)
    assert list(service.http.asked) == ["GET /weights", BEGIN]
