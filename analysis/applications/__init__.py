"""The paper's applications and a demonstration: data, program, tables and figures."""
