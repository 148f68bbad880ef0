"""Faults that no worker can recover from: it stops at once, and logs what is lost and what to do."""

import asyncio
import signal
import uuid
from pathlib import Path

import psycopg
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from support.conditions import wait_until
from support.events.event_examples import EXAMPLES
from support.processes.esper_processes import cli, log_of, running, worker

from esper.embedded.processes import ChildProcess
from esper.embedded.stack import EmbeddedStack
from esper.oona.admin.topics import admin_client, apply_topics
from esper.oona.log_reader import end_offsets, partition_of
from esper.oona.producer import OonaProducer
from esper.schemas.events import EpochCompleted
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import RUNS
from esper.streams.database.migrations import migrate

RUN = "overtaken"
TIMES = {"ESPER_STREAMS__RETRY_MAX_DELAY_S": "1", "ESPER_STREAMS__SESSION_TIMEOUT_S": "6"}
EPOCH = next(e for e in EXAMPLES if isinstance(e, EpochCompleted))


class Log:
    """Epochs of one run, one for each record, in one partition of a stack."""

    def __init__(self, stack: EmbeddedStack) -> None:
        self.stack, self._sequence = stack, 0
        self.kafka = stack.settings().need_kafka()
        self.topic_partition = (RUNS.name, partition_of(RUN, RUNS))

    def add(self, num_epochs: int) -> None:
        """Write the next epochs."""
        messages = []
        for _ in range(num_epochs):
            fields = {"run_id": RUN, "sequence": self._sequence, "epoch": self._sequence, "step": self._sequence}
            event = EPOCH.model_copy(update=fields)
            messages.append(OonaMessage.of(event, id=uuid.uuid4(), source="test"))
            self._sequence += 1

        async def send() -> None:
            async with OonaProducer(self.kafka) as producer:
                await producer.send_batch(messages)

        asyncio.run(send())

    def expire(self) -> None:
        """Delete all records, as retention does in the end."""

        async def delete() -> None:
            ends = await end_offsets(self.kafka, [RUNS])
            async with admin_client(self.kafka) as client:
                await client.delete_records(
                    {TopicPartition(*self.topic_partition): RecordsToDelete(ends[self.topic_partition])}
                )

        asyncio.run(delete())

    def wait_until_projected(self) -> None:
        """Wait until every epoch is projected."""
        wait_until(lambda: self.num_projected() == self._sequence, 60, "the epochs")

    def num_projected(self) -> int:
        """Number of projected epochs."""
        with psycopg.connect(self.stack.postgres.dsn) as connection:
            row = connection.execute("SELECT count(*) FROM esper.epochs WHERE run_id = %s", (RUN,)).fetchone()
        return int(row[0]) if row else 0

    def execute(self, statement: str) -> None:
        """Execute a statement in Postgres."""
        with psycopg.connect(self.stack.postgres.dsn, autocommit=True) as connection:
            connection.execute(statement.encode())


def refusal(stack: EmbeddedStack, folder: Path, name: str, **env: str) -> str:
    """Log of a worker that refuses to start."""
    child = worker(stack, folder, name, **{**TIMES, **env})
    child.start()
    wait_until(lambda: not child.is_alive, 90, f"the refusal: {name}")
    assert child.returncode == 1
    assert "Traceback" not in log_of(child)
    return log_of(child)


def stop_line(child: ChildProcess) -> str:
    """The log line of the first partition that a worker stops."""
    wait_until(lambda: "partition.stopped" in log_of(child), 90, "a stopped partition")
    assert child.is_alive
    return next(line for line in log_of(child).splitlines() if "partition.stopped" in line)


def run(stack: EmbeddedStack, folder: Path, *arguments: str) -> str:
    code, printed = cli(stack, folder, *arguments)
    assert code == 0, printed
    return printed


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_overtaken_by_retention_reports_loss(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    log = Log(fresh_stack)
    log.add(5)
    with running(worker(fresh_stack, tmp_path, "first", **TIMES), "worker.ready"):
        log.wait_until_projected()
    log.add(5)
    log.expire()
    refused = refusal(fresh_stack, tmp_path, "overtaken-while-stopped")
    assert (
        f"{RUNS.name}[{log.topic_partition[1]}]: offsets 5 to 9 expired before they were projected and are lost"
        in refused
    )
    assert "esper projections rebuild" in refused
    run(fresh_stack, tmp_path, "projections", "rebuild")
    with running(worker(fresh_stack, tmp_path, "second", **TIMES), "worker.ready") as child:
        log.add(1)
        wait_until(lambda: log.num_projected() == 1, 60, "the epoch after the loss")
        child.send(
            signal.SIGSTOP
        )  # overtaken while it runs: the Kafka client would silently continue at the log's start
        log.add(3)  # a fetch in progress returns these
        log.add(4)
        log.expire()
        child.send(signal.SIGCONT)
        line = stop_line(child)
        assert "expired before they were projected and are lost" in line
        assert "esper projections rebuild" in line
    run(fresh_stack, tmp_path, "projections", "rebuild")
    with running(worker(fresh_stack, tmp_path, "third", **TIMES), "worker.ready"):
        assert "live and rebuilt are equal" in run(fresh_stack, tmp_path, "projections", "verify")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_refuses_inconsistent_state(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    log = Log(fresh_stack)
    log.add(5)
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    refused = refusal(fresh_stack, tmp_path, "no-folder", ESPER_STATE_DIR=str(blocked))
    assert "no member id can be locked in" in refused
    with running(
        worker(fresh_stack, tmp_path, "first", ESPER_STREAMS__MEMBER_ID="3", **TIMES), "worker.ready"
    ) as child:
        log.wait_until_projected()
        refused = refusal(fresh_stack, tmp_path, "same-member-id", ESPER_STREAMS__MEMBER_ID="3")
        assert "member id 3 of this host is held by another worker" in refused
        log.execute("DROP SCHEMA esper CASCADE")  # recreated under a worker that is at offset 5
        migrate(fresh_stack.settings().need_postgres())
        log.add(1)
        assert "the projections hold no position any more" in stop_line(child)
    with running(worker(fresh_stack, tmp_path, "second", **TIMES), "worker.ready"):
        log.wait_until_projected()
    log.execute(f"UPDATE esper.positions SET next_offset = 1000 WHERE topic = '{RUNS.name}'")
    refused = refusal(fresh_stack, tmp_path, "beyond-the-end")
    assert f"{RUNS.name}[{log.topic_partition[1]}]: the projections end at offset 1000, the log at 6" in refused
    assert "esper projections rebuild" in refused


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_stopped_in_transaction_blocks_no_other(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    """A worker whose host is gone keeps its connection; Postgres ends its transaction."""
    log = Log(fresh_stack)
    stopped = worker(fresh_stack, tmp_path, "stopped", ESPER_STREAMS__TRANSACTION_TIMEOUT_S="15", **TIMES)
    with running(stopped, "worker.ready"):
        with psycopg.connect(fresh_stack.postgres.dsn) as connection:
            connection.execute(
                "LOCK TABLE esper.epochs IN ACCESS EXCLUSIVE MODE"
            )  # the worker waits here inside its own transaction
            log.add(5)
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'esper.epochs'::regclass"
            wait_until(lambda: connection.execute(waiting).fetchone() == (1,), 60, "the worker at the lock")
            stopped.send(signal.SIGSTOP)
        with running(worker(fresh_stack, tmp_path, "second", **TIMES), "worker.ready"):
            log.wait_until_projected()
            stopped.send(signal.SIGCONT)
            log.add(5)
            log.wait_until_projected()
            assert "live and rebuilt are equal" in run(fresh_stack, tmp_path, "projections", "verify")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_worker_detects_wiped_broker(fresh_stack: EmbeddedStack, tmp_path: Path) -> None:
    log = Log(fresh_stack)
    log.add(5)
    with running(worker(fresh_stack, tmp_path, "first", **TIMES), "worker.ready") as child:
        log.wait_until_projected()
        fresh_stack.kafka.stop()
        fresh_stack.kafka.wipe()
        fresh_stack.kafka.start()
        asyncio.run(apply_topics(log.kafka))
        log.add(20)  # longer than the old log, so that its offsets look valid
        wait_until(lambda: "a wiped broker, or the wrong address" in log_of(child), 120, "the refusal")
        assert "esper projections rebuild" in log_of(child)
        assert log.num_projected() == 5, "records of the new log were projected"
    run(fresh_stack, tmp_path, "projections", "rebuild")
    with running(worker(fresh_stack, tmp_path, "second", **TIMES), "worker.ready"):
        wait_until(lambda: log.num_projected() == 20, 60, "the new log")
        assert "live and rebuilt are equal" in run(fresh_stack, tmp_path, "projections", "verify")
