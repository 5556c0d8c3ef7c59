"""Renders chat templates: a program of its own, run by `models/chat_template.py`, never imported.

A template is code of whoever published the model. Jinja's sandbox keeps it from other objects, but
not from `'a' * 10**11`; inside a process of its own the operating system bounds memory and time,
and no operation can be forgotten. The environment is the one that transformers gives templates
(transformers/utils/chat_template_utils.py, 5.24).

It reads requests from its standard input, each 8 bytes of length and a pickle of (template,
variables, seconds, megabytes), and answers each with 1 byte (O: the text, E: an error, M: out of
memory), 8 bytes of length and UTF-8. A request out of time ends the process, by SIGPROF.
"""

import contextlib
import datetime
import json
import pickle
import signal
import struct
import sys

sys.path += sys.argv[1:]  # where jinja2 and markupsafe are: nothing else of the parent's is here

import jinja2  # noqa: E402
import jinja2.ext  # noqa: E402
import jinja2.nodes  # noqa: E402
import jinja2.sandbox  # noqa: E402

try:
    import resource
except ImportError:  # no Unix: the parent's own clock is all there is
    resource = None

_ERROR_CHARACTERS = 500


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what training learns; its content is kept."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller):
        return caller()


class _Dict:
    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args, **kwargs):  # no self: a template may name an attribute so
        for name in (attributes := dict(*args[1:], **kwargs)):
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name, value):
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"unsafe attribute of a namespace: {name!r}")


def _environment():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML, which chat templates do not expect.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(form):
    return datetime.datetime.now().strftime(form)


@contextlib.contextmanager
def _bounded(seconds, megabytes):
    """Processor time from here on, memory beyond what the process has already mapped."""
    if resource is None:
        yield
        return
    mapped = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (megabytes << 20), before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles SIGPROF: the process ends
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, before)


def _render(environment, templates, template, variables):
    """(kind, bytes) of an answer; messages are made here too, since they may show huge values."""
    try:
        if template not in templates:
            templates.clear()
            templates[template] = environment.from_string(template)
        text = templates[template].render(**variables)
        return b"O", text.encode("utf-8", "surrogatepass")
    except MemoryError:
        raise
    except RecursionError:
        message = "nested too deeply"
    except jinja2.TemplateError as error:
        message = str(error) or type(error).__name__
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    return b"E", message[:_ERROR_CHARACTERS].encode("utf-8", "replace")


def _answer(environment, templates, request):
    template, variables, seconds, megabytes = request
    try:
        with _bounded(seconds, megabytes):
            return _render(environment, templates, template, variables)
    except MemoryError:
        return b"M", f"it needs more than {megabytes} MB of memory".encode()


def _main():
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not end up among the answers
    environment, templates = _environment(), {}
    while len(head := requests.read(8)) == 8:
        request = pickle.loads(requests.read(struct.unpack("<Q", head)[0]))
        kind, body = _answer(environment, templates, request)
        answers.write(kind + struct.pack("<Q", len(body)))
        answers.write(body)
        answers.flush()


if __name__ == "__main__":
    _main()
