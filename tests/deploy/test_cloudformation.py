"""The CloudFormation stacks: the queue's made in moto and worked on, the service's filled in and looked at."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from cloudformation import FOLDER, QUEUE_ARN, Filled, Scaling, read, service
from dockerfile import parse, words_of
from pydantic_settings import CliApp
from recorder import Recorder

from cvworker.cli import COMMANDS
from cvworker.embedded.receiver import Received
from cvworker.embedded.sqs import EmbeddedSqs
from cvworker.settings import PREFIX, Settings
from cvworker.surroundings import POLL_S
from world import World, picture, poll, world

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NOTICE_S = 120
"""From the notice of a spot interruption to the end."""


def container(filled: Filled) -> dict[str, Any]:
    return dict(filled.properties("TaskDefinition")["ContainerDefinitions"][0])


def environment(filled: Filled) -> dict[str, str]:
    return {each["Name"]: str(each["Value"]) for each in container(filled)["Environment"]}


def statements(filled: Filled, role: str) -> list[dict[str, Any]]:
    return [
        {**each, "Action": [each["Action"]] if isinstance(each["Action"], str) else each["Action"]}
        for policy in filled.properties(role)["Policies"]
        for each in policy["PolicyDocument"]["Statement"]
    ]


def actions(filled: Filled, role: str) -> set[str]:
    return {action for each in statements(filled, role) for action in each["Action"]}


# ---- both templates


@pytest.mark.parametrize("name", ["queue.yaml", "service.yaml"])
def test_the_linter_finds_nothing(name: str) -> None:
    done = subprocess.run([BIN / "cfn-lint", "--include-checks", "I", "--", FOLDER / name], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("name", "without_default"),
    [("queue.yaml", set()), ("service.yaml", {"ImageTag", "QueueArn", "VpcId", "SubnetIds"})],
)
def test_parameters_have_descriptions_and_all_but_the_place_and_the_image_have_defaults(
    name: str, without_default: set[str]
) -> None:
    template = read(name)
    assert {key for key, each in template["Parameters"].items() if "Default" not in each} == without_default
    assert all(len(each["Description"]) > 10 for each in template["Parameters"].values())
    groups = template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    assert sorted(key for group in groups for key in group["Parameters"]) == sorted(template["Parameters"])


def test_variables_below_deploy_are_settings() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ".env", ".json"}:
            for variable in re.findall(rf"{PREFIX}[A-Z_]+[A-Z]", path.read_text()):
                assert variable in known, f"{path}: {variable}"


# ---- the queue, in moto, with workers on it: filled, scaled for, drained


class Stack:
    """The queue stack where :func:`world` expects an SQS; workers come by way of ``recorder``."""

    def __init__(self, sqs: EmbeddedSqs, recorder: Recorder) -> None:
        self.sqs, self.recorder = sqs, recorder
        self.outputs: dict[str, str] = {}

    def client(self, service: str = "sqs") -> Any:
        return boto3.client(
            service,
            endpoint_url=self.sqs.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def environment(self) -> dict[str, str]:
        urls = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL_S3"}
        return {**self.sqs.environment(), **dict.fromkeys(urls, self.recorder.url)}

    def create_queue(self, name: str, *, visibility_timeout: int = 30, max_receives: int | None = 5) -> str:
        given = {"VisibilityTimeout": visibility_timeout, "MaxReceiveCount": max_receives}
        client = self.client("cloudformation")
        client.create_stack(
            StackName=name,
            TemplateBody=(FOLDER / "queue.yaml").read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": str(value)} for key, value in given.items()],
        )
        stack = client.describe_stacks(StackName=name)["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        self.outputs = {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
        return self.outputs["QueueUrl"]

    def attributes(self, output: str = "QueueUrl") -> dict[str, str]:
        url = self.outputs[output]
        return dict(self.client().get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"])


@dataclass
class Course:
    """What happened from an empty queue to an empty queue."""

    stack: Stack
    here: World
    tasks: list[int]
    """Wanted, minute by minute: before anything came, as it had come, one minute later, and when all was done."""
    codes: list[int]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    with ExitStack() as stack:
        sqs = stack.enter_context(EmbeddedSqs())
        peer = Stack(sqs, stack.enter_context(Recorder(sqs.endpoint)))
        here = stack.enter_context(world(tmp_path_factory.mktemp("course"), sqs=peer))
        yield drained(peer, here)


def drained(stack: Stack, here: World) -> Course:
    scaling = Scaling(service(QueueArn=stack.outputs["QueueArn"], BacklogPerTask=10))
    s3 = stack.client("s3")
    for bucket in ("models", "photos"):
        s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket="models", Key="mean.safetensors", Body=b"any: the module reads none")
    requests = [here.request(number) for number in range(20)]
    s3.put_object(Bucket="photos", Key="0.png", Body=picture(0))
    requests[0]["image_url"] = "s3://photos/0.png"
    refused: list[str] = []

    def in_vain_at_first(received: Received) -> int:
        if "ecs:UpdateTaskProtection" not in stack.recorder.actions:
            return 503  # tried again in place: so messages are held until the worker has seen to its protection
        if received.id == "req-1" and not refused:
            refused.append(received.id)
            return 404  # tried again by SQS
        return 204

    here.receiver.respond = in_vain_at_first

    tasks = [scaling.desired(0, stack.attributes(), 0)]
    here.send(*requests)
    for _ in range(2):
        tasks.append(scaling.desired(tasks[-1], stack.attributes(), tasks[-1]))
    workers = [
        here.worker(
            "--exit-when-idle",
            "2",
            CVWORKER_WEIGHTS="s3://models/mean.safetensors",
            CVWORKER_ALLOWED_BUCKETS="photos",
            CVWORKER_PREPROCESS_WORKERS="1",
            CVWORKER_CLOUDWATCH_NAMESPACE="cvworker",
            XDG_CACHE_HOME=str(here.folder / f"cache-{number}"),
            ECS_AGENT_URI=stack.recorder.url,
        )
        for number in range(tasks[-1])
    ]
    codes = [worker.wait(200) for worker in workers]
    poll(lambda: here.counts() == (0, 0), 10, "an empty queue")
    tasks.append(scaling.desired(tasks[-1], stack.attributes(), tasks[-1]))
    return Course(stack, here, tasks, codes)


def test_the_queue_keeps_what_cannot_be_answered_and_encrypts_it(course: Course) -> None:
    queue, dead = course.stack.attributes(), course.stack.attributes("DeadLettersUrl")
    assert json.loads(queue["RedrivePolicy"]) == {"deadLetterTargetArn": dead["QueueArn"], "maxReceiveCount": 5}
    assert int(dead["MessageRetentionPeriod"]) > int(queue["MessageRetentionPeriod"])
    assert queue["SqsManagedSseEnabled"] == dead["SqsManagedSseEnabled"] == "true"


def test_tasks_go_from_none_to_one_to_what_the_backlog_needs_and_back_to_none(course: Course) -> None:
    assert course.tasks == [0, 1, 2, 0]


def test_that_many_workers_answer_every_request_once(course: Course) -> None:
    answers = course.here.receiver.answers
    assert sorted(answers) == sorted(f"req-{number}" for number in range(20))
    assert all(course.here.right(answer) for answer in answers.values())
    assert course.here.receiver.duplicates == {}
    assert course.codes == [0, 0]


def test_the_workers_role_allows_exactly_the_calls_that_workers_made(course: Course) -> None:
    filled = service(
        QueueArn=course.stack.outputs["QueueArn"], ReadableObjects="arn:aws:s3:::models/*,arn:aws:s3:::photos/*"
    )
    assert actions(filled, "TaskRole") == course.stack.recorder.actions


# ---- who may do what


def test_the_worker_may_touch_this_queue_these_objects_and_tasks_of_this_cluster_only() -> None:
    objects = ["arn:aws:s3:::models/threat/*", "arn:aws:s3:::photos/*"]
    found = {
        each["Action"][0]: each["Resource"]
        for each in statements(service(ReadableObjects=",".join(objects)), "TaskRole")
    }
    assert found == {
        "sqs:ReceiveMessage": QUEUE_ARN,
        "ecs:UpdateTaskProtection": "arn:aws:ecs:eu-west-1:123456789012:task/Cluster/*",
        "s3:GetObject": objects,
    }


def test_without_objects_the_worker_may_not_read_s3_at_all() -> None:
    assert {action for action in actions(service(), "TaskRole") if not action.startswith(("sqs:", "ecs:"))} == set()


def test_keys_of_ones_own_may_decrypt_for_sqs_and_s3_only() -> None:
    key = "arn:aws:kms:eu-west-1:123456789012:key/1"
    *_, found = statements(service(KmsKeyArns=key), "TaskRole")
    assert (found["Action"], found["Resource"]) == (["kms:Decrypt"], [key])
    assert found["Condition"]["StringEquals"]["kms:ViaService"] == [
        "sqs.eu-west-1.amazonaws.com",
        "s3.eu-west-1.amazonaws.com",
    ]


def test_no_role_has_a_wildcard_but_where_aws_knows_no_resource() -> None:
    everything = {"ReadableObjects": "arn:aws:s3:::a/*", "KmsKeyArns": "arn:k", "CallbackSecretArn": "arn:s"}
    filled = service(**everything)
    for role in filled.of_type("AWS::IAM::Role"):
        for each in statements(filled, role):
            assert not any("*" in action for action in each["Action"]), each
            if each["Resource"] == "*":
                nameless = {"ecr:GetAuthorizationToken", "ecs:DiscoverPollEndpoint"}
                assert set(each["Action"]) <= nameless or "ecs:cluster" in each["Condition"]["ArnEquals"], each
        assert "ManagedPolicyArns" not in filled.properties(role)


def test_the_secret_goes_to_the_container_by_the_execution_role_and_never_in_the_clear() -> None:
    arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:callbacks-AbCdEf"
    filled = service(CallbackSecretArn=arn)
    assert container(filled)["Secrets"] == [{"Name": "CVWORKER_CALLBACK_SECRET", "ValueFrom": arn}]
    assert "secretsmanager:GetSecretValue" in actions(filled, "ExecutionRole")
    assert "CVWORKER_CALLBACK_SECRET" not in environment(filled)
    assert "Secrets" not in container(service())
    assert "secretsmanager:GetSecretValue" not in actions(service(), "ExecutionRole")


# ---- how the worker runs


def test_the_variables_make_settings_that_a_worker_accepts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment(service(ImageBuckets="photos,more", CallbackUrl="")).items():
        monkeypatch.setenv(name, value)
    settings = CliApp.run(Settings, cli_args=[])
    assert settings.queue_url == "https://sqs.eu-west-1.amazonaws.com/123456789012/images"
    assert settings.allowed_buckets == ["photos", "more"]
    assert settings.callback_url is None
    assert settings.device == "cuda"


@pytest.mark.parametrize("grace", read("service.yaml")["Parameters"]["ShutdownGrace"]["AllowedValues"])
def test_ecs_waits_for_the_stop_and_all_of_it_fits_into_a_spot_notice(grace: str) -> None:
    filled = service(ShutdownGrace=grace)
    told, waits = float(environment(filled)["CVWORKER_SHUTDOWN_GRACE"]), container(filled)["StopTimeout"]
    assert told == float(grace)
    assert told + 5 <= waits
    assert POLL_S + waits <= NOTICE_S - 10


def test_the_default_grace_is_the_workers_own() -> None:
    assert float(service().parameters["ShutdownGrace"]) == Settings.model_fields["shutdown_grace"].default


def test_the_health_check_is_a_command_that_there_is() -> None:
    kind, program, command = container(service())["HealthCheck"]["Command"]
    assert (kind, program) == ("CMD", "cvworker")
    assert command in COMMANDS


def test_the_root_is_read_only_and_what_is_written_to_are_the_images_volumes() -> None:
    filled = service()
    worker = next(stage for stage in parse((ROOT / "Dockerfile").read_text()) if stage.name == "worker")
    mounts = container(filled)["MountPoints"]
    assert container(filled)["ReadonlyRootFilesystem"] is True
    assert [each["ContainerPath"] for each in mounts] == words_of(worker.all("VOLUME")[0])
    assert {each["SourceVolume"] for each in mounts} == {
        each["Name"] for each in filled.properties("TaskDefinition")["Volumes"]
    }


def test_a_task_has_a_gpu_shared_memory_and_no_capability() -> None:
    found = container(service(SharedMemory=2048))
    assert found["ResourceRequirements"] == [{"Type": "GPU", "Value": "1"}]
    assert found["LinuxParameters"] == {"SharedMemorySize": 2048, "Capabilities": {"Drop": ["ALL"]}}


def test_a_slow_log_does_not_hold_the_worker_up() -> None:
    options = container(service())["LogConfiguration"]["Options"]
    assert options["mode"] == "non-blocking"
    assert options["awslogs-group"] == "LogGroup"


def test_tasks_may_call_exactly_the_ports_that_the_worker_dials() -> None:
    filled = service()
    rules = filled.properties("TaskSecurityGroup")["SecurityGroupEgress"]
    assert {str(rule["FromPort"]) for rule in rules} == set(environment(filled)["CVWORKER_ALLOWED_PORTS"].split(","))
    assert all(rule["FromPort"] == rule["ToPort"] for rule in rules)
    assert {ipaddress.ip_network(rule.get("CidrIp") or rule["CidrIpv6"]).version for rule in rules} == {4, 6}
    assert not any("SecurityGroupIngress" in each for each in filled.of_type("AWS::EC2::SecurityGroup").values())


# ---- the machines


def test_machines_need_a_token_for_metadata_and_drain_on_a_spot_notice() -> None:
    data = service().properties("LaunchTemplate")["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true\n" in data["UserData"]
    assert "ECS_CLUSTER=Cluster\n" in data["UserData"]
    assert data["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def test_both_capacity_providers_scale_themselves_to_zero_and_drain() -> None:
    filled = service()
    for name, each in filled.of_type("AWS::ECS::CapacityProvider").items():
        provider = each["AutoScalingGroupProvider"]
        assert provider["ManagedScaling"]["Status"] == provider["ManagedDraining"] == "ENABLED", name
        assert provider["ManagedTerminationProtection"] == "ENABLED"
        group = filled.properties(provider["AutoScalingGroupArn"])
        assert (group["MinSize"], group["NewInstancesProtectedFromScaleIn"]) == ("0", True)
        assert "DesiredCapacity" not in group
    assert filled.properties("CapacityProviders")["CapacityProviders"] == ["OnDemand", "Spot"]


def test_the_first_tasks_are_on_demand_and_the_others_on_spot() -> None:
    strategy = service(OnDemandTasks=2).properties("Service")["CapacityProviderStrategy"]
    assert strategy == [
        {"CapacityProvider": "OnDemand", "Base": 2, "Weight": 0},
        {"CapacityProvider": "Spot", "Weight": 1},
    ]


def test_a_deployment_can_go_on_beside_protected_tasks_and_goes_back_by_itself() -> None:
    found = service().properties("Service")
    assert "DesiredCount" not in found  # an update would set it back
    assert found["DeploymentConfiguration"]["MinimumHealthyPercent"] == 0
    assert found["DeploymentConfiguration"]["MaximumPercent"] == 200
    assert found["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", set()),
        ("s3", {"s3"}),
        ("all", {"s3", "sqs", "ecr.api", "ecr.dkr", "logs", "ecs", "ecs-agent", "ecs-telemetry", "secretsmanager"}),
    ],
)
def test_endpoints_are_made_as_chosen(choice: str, names: set[str]) -> None:
    made = service(VpcEndpoints=choice).of_type("AWS::EC2::VPCEndpoint")
    prefix = "com.amazonaws.eu-west-1."
    assert {each["ServiceName"].removeprefix(prefix) for each in made.values()} == names


# ---- alarms


def test_alarms_watch_age_and_dead_letters_and_tell_the_topic_if_there_is_one() -> None:
    topic = "arn:aws:sns:eu-west-1:123456789012:on-call"
    told = Filled("queue.yaml", AlarmTopicArn=topic, MaxAge=600).of_type("AWS::CloudWatch::Alarm")
    assert {
        name: (each["MetricName"], each["Dimensions"][0]["Value"], each["Threshold"]) for name, each in told.items()
    } == {
        "TooOld": ("ApproximateAgeOfOldestMessage", "Queue.QueueName", 600),
        "HasDeadLetters": ("ApproximateNumberOfMessagesVisible", "DeadLetters.QueueName", 0),
    }
    assert all(each["AlarmActions"] == each["OKActions"] == [topic] for each in told.values())
    untold = Filled("queue.yaml").of_type("AWS::CloudWatch::Alarm")
    assert not any("AlarmActions" in each for each in untold.values())


def test_a_key_of_ones_own_takes_the_place_of_sqs_encryption() -> None:
    for queue in Filled("queue.yaml", KmsKeyId="arn:k").of_type("AWS::SQS::Queue").values():
        assert queue["KmsMasterKeyId"] == "arn:k"
        assert "SqsManagedSseEnabled" not in queue


def test_a_stack_that_is_deleted_leaves_the_messages() -> None:
    queues = [each for each in read("queue.yaml")["Resources"].values() if each["Type"] == "AWS::SQS::Queue"]
    assert [each["DeletionPolicy"] for each in queues] == ["RetainExceptOnCreate"] * 2


def test_the_parameters_on_the_page_are_the_templates() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    commands = re.findall(r"--template-file deploy/cloudformation/(\S+)((?:.*\\\n)*.*)", text)
    assert [name for name, _ in commands] == ["queue.yaml", "service.yaml", "service.yaml"]
    for name, rest in commands:
        named = set(re.findall(r"\b([A-Z]\w+)=", rest))
        assert named <= set(read(name)["Parameters"]), named
    table = text[text.index("| parameter |") : text.index("Every parameter has")]
    rows = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} <= set(read("service.yaml")["Parameters"])


def test_machines_come_from_the_newest_image_with_gpu_drivers() -> None:
    image = read("service.yaml")["Parameters"]["ImageId"]
    assert image["Type"] == "AWS::SSM::Parameter::Value<AWS::EC2::Image::Id>"
    assert image["Default"] == "/aws/service/ecs/optimized-ami/amazon-linux-2023/gpu/recommended/image_id"
    assert service().properties("LaunchTemplate")["LaunchTemplateData"]["ImageId"] == image["Default"]


def test_alarms_name_headings_that_there_are() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    alarms = Filled("queue.yaml").of_type("AWS::CloudWatch::Alarm").values()
    named = [re.search(r'[Ss]ee "([^"]+)" in docs/operations.md', each["AlarmDescription"]) for each in alarms]
    assert all(found and f"\n## {found[1]}\n" in page for found in named)
