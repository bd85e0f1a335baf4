"""What must keep a worker from starting."""

from __future__ import annotations

import torch

from world import MODULES

BROKEN = MODULES / "contract.py"
SECRET_PART = "TOPSECRETMATERIAL"

# By case: flags, variables (an empty one is unset), and what the one line must mention
REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no module": ([], {"CVWORKER_MODULE": ""}, "module"),
    "unknown module": (["--module", "nosuch"], {}, "module.*nosuch"),
    "no such package": (["--module", "no_such_package.models:Model"], {}, "module.*no_such_package"),
    "module file missing": (["--module", "missing.py:Model"], {}, "module.*missing.py"),
    "class missing": (["--module", f"{BROKEN}:Missing"], {}, "module.*Missing"),
    "not a module": (["--module", f"{MODULES / 'mean.py'}:NotAModule"], {}, "module.*NotAModule"),
    "method missing": (["--module", f"{MODULES / 'mean.py'}:NoProcess"], {}, "module.*process"),
    "import fails": (["--module", "import_fails.py:Model"], {}, "module.*no_such_package"),
    "import raises": (["--module", "import_raises.py:Model"], {}, "module.*no luck"),
    "syntax error": (["--module", "syntax_error.py:Model"], {}, "module.*syntax"),
    "init raises": (["--module", f"{BROKEN}:RaisesInInit"], {}, "no luck"),
    "setup raises": (["--module", f"{BROKEN}:RaisesInSetup"], {}, "no luck"),
    "weights missing for threat": (["--module", "threat"], {}, "weights"),
    "weights file missing": (["--module", "threat", "--weights", "nowhere.safetensors"], {}, "weights.*nowhere"),
    "weights of another sum": (["--weights", "file.safetensors#sha256=" + "0" * 64], {}, "weights.*sha-?256"),
    "weights no safetensors": (["--module", "threat", "--weights", "file.safetensors"], {}, "weights"),
    "weights object missing": (["--weights", "s3://nowhere/file.safetensors"], {}, "weights.*nowhere"),
    "weights host missing": (["--weights", "https://no-such-host.invalid/w.safetensors"], {}, "weights.*no-such-host"),
    "device that is none": (["--device", "gpu"], {}, "device"),
    "port taken": (["--http-port", "{taken}"], {}, "http.port.*{taken}|{taken}.*http.port"),
    "no queue": ([], {"CVWORKER_QUEUE_URL": ""}, "queue.url"),
    "queue that does not exist": (["--queue-url", "{endpoint}/123456789012/nothing"], {}, "queue.url.*nothing"),
    "queue url that is none": (["--queue-url", "images"], {}, "queue.url"),
    "fifo queue": (["--queue-url", "{fifo}"], {}, "fifo"),
    "endpoint closed": ([], {"AWS_ENDPOINT_URL": "{closed}", "AWS_ENDPOINT_URL_SQS": "{closed}"}, "queue.url|endpoint"),
    "no region": (["--queue-url", "http://queue/1/images"], {"AWS_DEFAULT_REGION": "", "AWS_REGION": ""}, "region"),
    "no credentials": ([], {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
    "word for a number": (["--batch-size", "many"], {}, "batch.size"),
    "zero": (["--batch-size", "0"], {}, "batch.size"),
    "negative": (["--download-timeout", "-1"], {}, "download.timeout"),
    "not a number": (["--callback-timeout", "nan"], {}, "callback.timeout"),
    "port beyond all": (["--http-port", "70000"], {}, "http.port"),
    "bytes that are none": (["--max-image-bytes", "20 elephants"], {}, "max.image.bytes"),
    "precision unknown": (["--precision", "fp8"], {}, "precision"),
    "variable with a word": ([], {"CVWORKER_RECEIVE_THREADS": "three"}, "receive.threads"),
    "visibility of days": (["--visibility-timeout", "50000"], {}, "visibility.timeout"),
    "list cut off": (["--allowed-hosts", '["a", "b"'], {}, "allowed.hosts"),
    "unknown flag": (["--batch-sise", "8"], {}, "batch-sise"),
    "flag without value": (["--batch-size"], {}, "batch.size"),
    "lease shorter than visibility": (["--max-lease", "10", "--visibility-timeout", "60"], {}, "max.lease"),
    "default callback of no use": (["--callback-url", "ftp://host/answers"], {}, "callback.url"),
    "malformed secret": ([], {"CVWORKER_CALLBACK_SECRET": SECRET_PART}, "callback.secret"),
    "secret of wrong base64": ([], {"CVWORKER_CALLBACK_SECRET": f"whsec_{SECRET_PART}%%%"}, "callback.secret"),
    "secret too short": ([], {"CVWORKER_CALLBACK_SECRET": "whsec_" + SECRET_PART[:8]}, "callback.secret"),
    "second secret malformed": (
        [],
        {"CVWORKER_CALLBACK_SECRET": f'["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "{SECRET_PART}"]'},
        "callback.secret",
    ),
    "line in .env": (["{dotenv:CVWORKER_BATCH_SIZE=many}"], {}, "batch.size"),
}  # fmt: skip
if not torch.cuda.is_available():
    REFUSED["cuda without a GPU"] = (["--device", "cuda"], {}, "device.*cuda")
