"""Printed reports of commands, one module a command."""
