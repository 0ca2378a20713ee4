# Sidekiq's side of the benches: the job that does nothing, and how Ruby enqueues it. Warnings and log lines are off.
require "sidekiq"
require "json"

redis = { url: ENV.fetch("REDIS_URL") }
Redis.sadd_returns_boolean = false
Sidekiq.logger.level = Logger::ERROR
Sidekiq.configure_client { |config| config.redis = redis }
Sidekiq.configure_server { |config| config.redis = redis }

class Noop
  include Sidekiq::Worker

  def perform(number) = nil
end

def now = Process.clock_gettime(Process::CLOCK_MONOTONIC)

def seconds
  began = now
  yield
  now - began
end

# Seconds that so many calls take, one by one, and so many jobs in bulk.
def enqueue(count, many)
  one = seconds { count.times { |number| Noop.perform_async(number) } }
  puts [one, seconds { Sidekiq::Client.push_bulk("class" => Noop, "args" => Array.new(many) { |number| [number] }) }].to_json
end

# One job after another onto an idle system, each with the time when it was pushed.
def ring(count, queues)
  count.times do |number|
    sleep 0.007
    Sidekiq::Client.push("class" => "ring", "queue" => queues[number % queues.size], "args" => [now])
  end
end
