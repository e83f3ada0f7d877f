"""The contract: records that cross a process. Stdlib and pydantic only; everyone may import it."""
