"""The Hub, web servers and directories that models come from."""
