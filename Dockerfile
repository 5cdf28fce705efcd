# docker build -t hps . && docker run --rm -v "$PWD/runs:/hps/runs" hps make reproduce
# On GPUs with --gpus all and, say, `make paper`. Written without Docker at hand: it has not been built yet.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /hps
COPY . .
RUN make env
CMD ["make", "help"]
