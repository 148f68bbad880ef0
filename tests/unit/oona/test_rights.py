"""Rights: every topic has one writer and a reader, and only Tamiyo writes what controls a run."""

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.errors import ConfigError
from esper.oona.admin.acls import Acl, AclPlan
from esper.oona.admin.rights import CLUSTER, Operation, Resource, Right, Service, default_principals, rights
from esper.schemas.topics import COMMANDS, DECISIONS, POLICIES, REDRIVES, TOPICS, VIEWS, TopicSpec, all_topics

RIGHTS = rights("workers")


def who_may(operation: Operation, topic: str) -> set[Service]:
    return {r.service for r in RIGHTS if (r.resource, r.name, r.operation) == (Resource.TOPIC, topic, operation)}


@pytest.mark.parametrize("topic", TOPICS, ids=lambda t: t.name)
def test_rights_give_each_topic_one_writer(topic: TopicSpec) -> None:
    writers = who_may(Operation.WRITE, topic.name)
    assert len(writers - {Service.OPERATOR}) == 1
    assert topic is not REDRIVES or writers == {Service.OPERATOR, Service.TAMIYO}
    assert {Service.WORKER, Service.OPERATOR} <= who_may(Operation.READ, topic.name)
    assert who_may(Operation.WRITE, topic.dead_letters.name) == {Service.WORKER}
    redrivers = {Service.OPERATOR} | (writers & {Service.TAMIYO} if topic is not REDRIVES else set())
    assert who_may(Operation.READ, topic.dead_letters.name) == redrivers


@pytest.mark.parametrize("topic", [VIEWS, DECISIONS, COMMANDS, POLICIES], ids=lambda t: t.name)
def test_rights_let_only_tamiyo_write_control_topics(topic: TopicSpec) -> None:
    assert who_may(Operation.WRITE, topic.name) == {Service.TAMIYO}


def test_rights_concern_only_resources_of_esper() -> None:
    topics = {t.name for t in all_topics()}
    for right in RIGHTS:
        known = {Resource.TOPIC: topics, Resource.GROUP: {"workers"}, Resource.CLUSTER: {CLUSTER}}
        assert right.name in known[right.resource]
    assert set(who_may(Operation.DESCRIBE, DECISIONS.name)) == {*Service}
    assert [r for r in RIGHTS if r.resource is Resource.CLUSTER] == [
        Right(Service.OPERATOR, Resource.CLUSTER, CLUSTER, Operation.DESCRIBE)
    ]


def test_plan_prunes_no_pattern_of_another_user() -> None:
    plan = AclPlan.of(default_principals(), "workers")
    mine = Acl("User:esper-trainer", "topic", "elsewhere", "write")
    exact = Acl("User:eve", "topic", DECISIONS.name, "write")
    prefixed = Acl("User:eve", "topic", "control.", "write", pattern="prefixed")
    wildcard = Acl("User:eve", "topic", "*", "write")
    elsewhere = Acl("User:eve", "topic", "elsewhere", "write")
    assert [plan.affects_esper(a) for a in (mine, exact, prefixed, wildcard, elsewhere)] == [
        True,
        True,
        True,
        True,
        False,
    ]
    assert [plan.may_prune(a) for a in (mine, exact, prefixed, wildcard, elsewhere)] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("option", ["nobody=alice", "trainer", "trainer="])
def test_acls_command_refuses_a_malformed_principal(option: str) -> None:
    done = CliRunner().invoke(
        app, ["acls", "list", "--principal", option], env={"ESPER_KAFKA__BOOTSTRAP_SERVERS": "h:1"}
    )
    assert isinstance(done.exception, ConfigError)
    assert f"--principal {option}: write SERVICE=USER, SERVICE one of trainer, worker" in str(done.exception)
