"""``python -m icw_compile.lab.documents``, in the repository's folder."""

from pathlib import Path

from icw_compile.lab.documents import write_documents

if __name__ == "__main__":
    print("\n".join(write_documents(Path.cwd())) or "Every page is what its result files give.")
