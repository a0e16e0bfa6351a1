"""Headers, frames and the transport between server and client, around an algorithm's messages."""
