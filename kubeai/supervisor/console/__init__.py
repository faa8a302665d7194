"""The console: a web page of Models, replicas and requests, served by the supervisor."""
