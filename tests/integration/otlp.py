"""A collector of traces made of OpenTelemetry's own messages: otlp.py FILE. Prints its port, and adds a line of JSON to FILE for each span it is sent."""

import http.server
import json
import sys

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


def value(any_value):
    return getattr(any_value, any_value.WhichOneof("value"))


def attributes(of) -> dict:
    return {pair.key: value(pair.value) for pair in of.attributes}


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf"), (self.path, self.headers)
        request = trace_service_pb2.ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        with open(sys.argv[1], "a") as file:
            for of_resource in request.resource_spans:
                for of_scope in of_resource.scope_spans:
                    for span in of_scope.spans:
                        line = {
                            "resource": attributes(of_resource.resource),
                            "trace": span.trace_id.hex(),
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "name": span.name,
                            "kind": trace_pb2.Span.SpanKind.Name(span.kind),
                            "from": span.start_time_unix_nano,
                            "until": span.end_time_unix_nano,
                            "attributes": attributes(span),
                            "status": trace_pb2.Status.StatusCode.Name(span.status.code),
                            "message": span.status.message,
                        }
                        file.write(json.dumps(line) + "\n")
        answer = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_) -> None:
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
print(server.server_address[1], flush=True)
server.serve_forever()
