# A server of one model; the docs' page "Serve" says how to run it.
FROM python:3.12-slim
RUN useradd --create-home server
COPY . /source
# PyTorch for the CPU; for a GPU leave the index out.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "/source[serve]" && rm -rf /source
USER server
WORKDIR /home/server
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz')"
ENTRYPOINT ["stitchable", "serve", "--host", "0.0.0.0"]
