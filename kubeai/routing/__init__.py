"""The hinge: routes and loads between the supervisor and its workers."""
