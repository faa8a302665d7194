"""Requests whose body is a multipart form."""
